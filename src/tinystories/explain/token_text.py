"""Tokens as text for people: what a token adds to the text, and a label for tables and pictures."""

from tinystories.data.tokenizer import END, Tokenizer

END_LABEL = "END"
# A space at the beginning of a token separates words; labels make it and other white space visible.
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of an id, with U+FFFD where it holds part of a character; the name of a special token.

    Ids outside the tokenizer's vocabulary, which padded models have, are written <ID>.
    """
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return special_name(tokenizer, token) or tokenizer.token_bytes[token].decode("utf-8", "replace")


def token_label(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a label without white space: "·dog" for " dog", "↵" for a newline, "\xf0" for part of a character.

    <|endoftext|> is END.
    """
    if token == tokenizer.end_id:
        return END_LABEL
    if token >= tokenizer.vocab_size or token in tokenizer.special_ids:
        return token_text(tokenizer, token)
    text = tokenizer.token_bytes[token].decode("utf-8", "backslashreplace").translate(VISIBLE)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def special_name(tokenizer: Tokenizer, token: int) -> str:
    """Return the name of a special token, such as <|endoftext|>; "" for others."""
    if token == tokenizer.end_id:
        return END
    added_tokens = tokenizer.json_data["added_tokens"] if token in tokenizer.special_ids else []
    return next((str(added["content"]) for added in added_tokens if added["id"] == token), "")
