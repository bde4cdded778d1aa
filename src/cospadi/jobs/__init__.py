"""Who solves, and what a job resumes from."""
