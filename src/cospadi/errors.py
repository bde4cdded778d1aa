"""What can go wrong through no fault of ours. The command line turns a UserError into one sentence and exit code 2."""


class UserError(ValueError):
    """A request that cannot be met as asked. The message is a sentence: what is wrong, where, what to do."""


class SizeError(UserError):
    """A size that a projection is too small for. The message names the projection and what to do."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or not what it says it is. The message names the file and the tensor."""


class OutputError(RuntimeError):
    """What a job has written is not what it should be, which is a fault of ours. The message names what differs."""


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or launched on this machine, where the reference has to do. It names why."""


def first_line(error: BaseException) -> str:
    """Another library's error in one line, without its final stop, to stand inside a sentence of ours; with the next
    line where the first one only introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    introduced = lines[0].endswith(":") and len(lines) > 1
    return (f"{lines[0]} {lines[1]}" if introduced else lines[0]).rstrip(".")
