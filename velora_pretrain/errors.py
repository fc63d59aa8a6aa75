"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a value, a file, a recipe key.

    The message is one line that names the file or dotted key and says what to do. The command line shows it
    without a traceback and exits with status 2.
    """


def one_line(error: BaseException, *, most_letters: int = 160) -> str:
    """What another program's error says, in one line of bounded length; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most_letters else f"{text[: most_letters - 3]}..."
