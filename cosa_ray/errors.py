"""The two ways a command can end badly, below every other floor."""


class UserError(Exception):
    """The user's mistake: one sentence saying what is wrong, where, and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run, trial or job that started and then failed, with its cause. Exit code 1."""
