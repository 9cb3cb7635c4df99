"""Messages of other libraries, shortened for messages of our own, which are one sentence."""


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
