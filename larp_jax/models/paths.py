"""Names of parameters: the keys of their path, joined by slashes."""


def path_name(path: tuple) -> str:
    """A pytree path as `tokenizer/encoder/...`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
