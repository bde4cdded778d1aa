"""What we use of other libraries without their promise that it stays: every such thing stands here, and nowhere else.

Each function says which public way it waits for; when that way is there, the function goes.
"""

from __future__ import annotations
