"""Errors that a user can fix; this imports nothing, so that workers may."""


class UserError(ValueError):
  """An error that the user can fix: in a path, a field, a flag or a file.

  The message has one to three lines: where the error is, what was found, what
  was expected, and the fix. The command line prints it without a traceback.
  """


class WriteError(UserError):
  """A path that cannot be written: the disk is full or read-only, say."""
