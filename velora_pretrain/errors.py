"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a value, a file, a recipe key.

    The message is one line that names the file or dotted key and says what to do. The command line shows it
    without a traceback and exits with status 2.
    """
