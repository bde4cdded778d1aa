"""A task of choices for lm-eval: its documents, and its file, with places for a name, their file and a prefix."""

from __future__ import annotations

QUESTIONS = [
    {"query": "2 squared is", "choices": ["4.", "5.", "and"], "gold": 0},
    {"query": "3 squared is", "choices": ["8", "9, halved", "2"], "gold": 1},
    {"query": "8 halved is", "choices": ["3.0", "halved 4", "4.0"], "gold": 2},
    {"query": "5 squared is", "choices": ["is", "25", "26, or so"], "gold": 1},
    {"query": "7 halved is", "choices": ["3.5", "3.6.", "37"], "gold": 0},
]
CHOOSE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{before}{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
