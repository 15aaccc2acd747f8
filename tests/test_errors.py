"""Messages are one short line that a terminal shows as it is, whatever files and their names hold."""

import pytest

from opt_megatron.errors import UserError, print_notice, printable


def test_what_can_be_shown_is_not_changed() -> None:
    text = "Größe 3 — ‘a’: 東京, 50%"
    assert printable(text) == str(UserError(text)) == text


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b[2J" * 10**5, "\ud800\n" * 10**4, "\U0001f600" * 5000])
def test_long_texts_lose_their_middle_and_control_characters_are_escaped(text: str) -> None:
    message = str(UserError(f"the file {text} is too long"))
    assert len(message) <= 1500 and message.isprintable()
    assert message.startswith("the file ") and message.endswith(" is too long") and "characters) ..." in message
    assert printable(message) == message


def test_invisible_characters_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    print_notice("a\x1b[31m\u202eb\r\n")
    assert capsys.readouterr().err == "opt-megatron: a\\x1b[31m\\u202eb\\r\\n\n"
