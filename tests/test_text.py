"""The text that a language model learns."""

import sysconfig
from pathlib import Path

import pytest
import torch

from bigkern.train.errors import UserError
from bigkern.train.text import MODULES, load_text, to_tokens
from bigkern.train.transformer import cut


def text_of(tokens):
    return bytes(tokens.tolist())


def test_the_standard_library_is_split_by_file():
    text = load_text(None, 256)
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(MODULES.split())
    assert len(set(names)) == len(names)
    parts = {"train": text_of(text.train), "validation": text_of(text.validation)}
    for i, name in enumerate(names):
        source = (folder / f"{name}.py").read_bytes()
        where = "validation" if i % 11 == 0 else "train"
        assert source in parts[where]
        parts[where] = parts[where].replace(source, b"", 1)
    assert parts == {"train": b"", "validation": b""}
    assert len(text.validation) > 0.05 * len(text)


def test_a_file_is_split_at_its_last_tenth(tmp_path):
    path = tmp_path / "text"
    path.write_text("0123456789" * 3 + "éä€")  # 37 bytes
    text = load_text(str(path), 3)
    assert text_of(text.train) + text_of(text.validation) == path.read_bytes()
    assert len(text.train) == 33
    other = tmp_path / "other"
    other.write_text("0123456789" * 3 + "éä$--")
    assert load_text(str(other), 3).digest != text.digest == load_text(str(path), 2).digest


def test_windows_overlap_by_one_byte():
    windows = cut(to_tokens(b"abcdefghij"), 3)
    assert [text_of(row) for row in windows] == [b"abcd", b"defg", b"ghij"]
    assert len(cut(to_tokens(b"abcdefghi"), 3)) == 2
    assert torch.equal(cut(to_tokens(b"ab"), 1), torch.tensor([[97, 98]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("content", "context", "message"),
    [
        (b"", 4, "text is empty"),
        (b"abc\xff", 1, "text is not UTF-8 text: invalid start byte at byte 3"),
        (b"abcdefghij" * 10, 10, "90 bytes to train on and 10 held out, got 10"),
        (b"abcdefghij" * 10, 1000, "context must be shorter than the text, .* got 1,000"),
        (b"a", 1, "1 bytes? to train on|0 bytes to train on and 1 held out, got 1"),
        (None, 4, "cannot read .*text: No such file"),
    ],
    ids=["empty", "binary", "short", "shorter", "one byte", "missing"],
)
def test_bad_texts(tmp_path, content, context, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(str(path), context)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Is a directory"):
        load_text(str(tmp_path), 4)


def test_a_library_without_a_module_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read .*abc\.py.*--text FILE"):
        load_text(None, 4)
