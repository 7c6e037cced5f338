"""Text to token ids and back, from the files that define a tokenizer. Nothing found in those files is executed.

`tokenizers` reads tokenizer.json and GPT-2's pair of files, `sentencepiece` its own models: a bare SentencePiece
model gives sentencepiece's own ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gdn2 import env
from gdn2.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

BosPolicy = Literal["auto", "yes", "no"]

_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_HUB_NAME = re.compile(r"(?:hf:(?:[\w.-]+/)?|[\w.-]+/)[\w.-]+(?:@[\w./-]+)?")
_HUB_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
]


class Tokenizer(Protocol):
    """What `load_tokenizer` returns. Special-token strings in a text are encoded as plain text."""

    digest: str  # sha256 of the defining bytes, BOS and EOS
    name: str
    vocab_size: int
    bos_id: int | None  # put once before every prompt when not None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS or EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""


class _Refusing:
    """Turns whatever the native libraries throw into a one-line CheckpointError.

    They raise bare `Exception`, and `PanicException` derives from `BaseException` alone.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | UserError):
            return
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{self.what}: {detail or type(error).__name__}") from error


class JsonTokenizer:
    """A `tokenizers` tokenizer."""

    def __init__(self, name: str, inner: tokenizers.Tokenizer, defining: bytes) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self.name = name
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.digest = ""
        self.defining = defining
        self._inner = inner
        self._failure = f"tokenizer {name} failed on a text"

    def encode(self, text: str) -> list[int]:
        with _Refusing(self._failure):
            return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _Refusing(self._failure):
            # Offsets are half of the work and nobody reads them here.
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
            return [list(one.ids) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        with _Refusing(self._failure):
            return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def adds_bos(self) -> int | None:
        """The id that the file's own post-processor puts in front of a text, if it does."""
        bare = self.encode("a")
        full = list(self._inner.encode("a", add_special_tokens=True).ids)
        return full[0] if len(full) > len(bare) and full[1 : 1 + len(bare)] == bare else None


class PieceTokenizer:
    """A SentencePiece model, with sentencepiece's own ids.

    User-defined symbols of the model stay what the model makes of them; control symbols never come from text.
    """

    def __init__(self, name: str, inner: sentencepiece.SentencePieceProcessor, defining: bytes) -> None:
        self.name = name
        self.vocab_size = int(inner.vocab_size())
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.digest = ""
        self.defining = defining
        self._inner = inner
        self._silent = {i for i in range(self.vocab_size) if inner.is_control(i) or inner.is_unknown(i)}
        self._failure = f"tokenizer {name} failed on a text"

    def encode(self, text: str) -> list[int]:
        with _Refusing(self._failure):
            return list(self._inner.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _Refusing(self._failure):
            return list(self._inner.encode(list(texts))) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        with _Refusing(self._failure):
            return str(self._inner.decode([int(i) for i in ids if i not in self._silent]))

    def id_of(self, token: str) -> int | None:
        found = int(self._inner.piece_to_id(token))
        return found if self._inner.id_to_piece(found) == token else None

    def adds_bos(self) -> int | None:
        """The model's BOS: the Llama family, for which such models are used bare, puts it before every text."""
        bos = int(self._inner.bos_id())
        return bos if bos >= 0 else None


_Loaded = JsonTokenizer | PieceTokenizer


def load_tokenizer(source: str | Path, bos: BosPolicy = "auto") -> Tokenizer:
    """Tokenizer of a tokenizer.json, a SentencePiece model, a directory, or a hub name.

    Args:
        source: a file; a directory (tokenizer.json is preferred to tokenizer.model, that to GPT-2's
            vocab.json + merges.txt or encoder.json + vocab.bpe); or `hf:OWNER/REPO[@REVISION]`, of which `hf:` may be
            left out where no such path exists.
        bos: whether prompts start with BOS; `auto` does what the files say (`add_bos_token`, else the tokenizer's own
            post-processor; a bare SentencePiece model with a BOS: yes).

    Raises:
        CheckpointError: nothing there, not a tokenizer, or no BOS to put where `bos` is `yes`.
    """
    if bos not in ("auto", "yes", "no"):
        raise UserError(f"bos must be auto, yes or no, got {bos!r}")
    if not str(source):
        raise CheckpointError("no tokenizer named: give a file, a directory or a hub name")
    path = Path(source)
    with _Refusing(f"tokenizer {str(source)!r}"):
        local = path.exists()
    if str(source).startswith("hf:") or not local:
        path = _from_hub(str(source))
    if path.is_dir():
        loaded, settings = _from_directory(path, str(source)), _settings(path)
    else:
        loaded, settings = _from_file(path, str(source)), {}
    _set_special(loaded, settings, bos)
    ends = f"bos={loaded.bos_id} eos={loaded.eos_id}"
    loaded.digest = sha256(loaded.defining + ends.encode()).hexdigest()
    return loaded


def _from_hub(source: str) -> Path:
    if not _HUB_NAME.fullmatch(source):
        raise CheckpointError(f"tokenizer {source!r}: no such path, and not a hub name (hf:OWNER/REPO[@REVISION])")
    repo, _, revision = source.removeprefix("hf:").partition("@")
    kept = env.data_dir() / "tokenizers" / repo.replace("/", "--")
    if kept.is_dir():
        return kept
    import huggingface_hub

    with _Refusing(f"tokenizer {source}: no such path, and the hub gave none"):
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=_HUB_FILES, local_files_only=bool(env.get("GDN2_DATA"))
        )
    return Path(found)


def _from_directory(path: Path, name: str) -> _Loaded:
    for file in ("tokenizer.json", "tokenizer.model"):
        if (path / file).is_file():
            return _from_file(path / file, name)
    for vocab, merges in _GPT2_FILES:
        if (path / vocab).is_file() and (path / merges).is_file():
            return _from_gpt2(path / vocab, path / merges, name)
    wanted = "tokenizer.json, tokenizer.model, vocab.json + merges.txt or encoder.json + vocab.bpe"
    raise CheckpointError(f"{path}: no {wanted}")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"tokenizer {path} is neither a file nor a directory")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"tokenizer {path}: {error.strerror}") from error


def _from_file(path: Path, name: str) -> _Loaded:
    data = _read(path)
    if data.lstrip()[:1] == b"{":
        import tokenizers

        with _Refusing(f"tokenizer {path} is not a tokenizer.json"):
            return JsonTokenizer(name, tokenizers.Tokenizer.from_str(data.decode("utf-8")), data)
    import sentencepiece

    with _Refusing(f"tokenizer {path} is neither a tokenizer.json nor a SentencePiece model"):
        # An empty file parses as an empty model, on which sentencepiece aborts the process later.
        if not data or b"\x00" not in data and data.isascii():
            raise ValueError(f"{len(data)} bytes of text" if data else "the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        if model.vocab_size() == 0:
            raise ValueError("the vocabulary is empty")
        return PieceTokenizer(name, model, data)


def _from_gpt2(vocab: Path, merges: Path, name: str) -> _Loaded:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab_bytes, merges_bytes = _read(vocab), _read(merges)
    with _Refusing(f"tokenizer {vocab} + {merges.name} is not a GPT-2 tokenizer"):
        ids = json.loads(vocab_bytes)
        lines = merges_bytes.decode("utf-8").split("\n")
        halves = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pairs = [(left, right) for left, right in halves]
        inner = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([token for token in ("<|endoftext|>",) if token in ids])
        return JsonTokenizer(name, inner, vocab_bytes + merges_bytes)


def _settings(path: Path) -> dict[str, Any]:
    """What the directory's JSON files say about BOS and EOS; the first file that speaks wins."""
    out: dict[str, Any] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if not (path / file).is_file():
            continue
        try:
            found = json.loads(_read(path / file))
        except ValueError as error:
            raise CheckpointError(f"{path / file} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path / file} is not a JSON object")
        for key in ("add_bos_token", "bos_token", "eos_token", "bos_token_id", "eos_token_id"):
            if found.get(key) is not None:
                out.setdefault(key, found[key])
    return out


def _special(loaded: _Loaded, settings: dict[str, Any], which: str, names: Iterable[str]) -> int | None:
    token = settings.get(f"{which}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        found = loaded.id_of(token)
        if found is None:
            raise CheckpointError(f"tokenizer {loaded.name}: {which}_token {token!r} is not in the vocabulary")
        return found
    number = settings.get(f"{which}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if isinstance(number, int) and not isinstance(number, bool):
        return number if number >= 0 else None
    return next((found for name in names if (found := loaded.id_of(name)) is not None), None)


def _set_special(loaded: _Loaded, settings: dict[str, Any], policy: BosPolicy) -> None:
    known = _special(loaded, settings, "bos", _BOS_NAMES)
    own = loaded.adds_bos()
    stated = settings.get("add_bos_token")
    wanted = policy == "yes" or (policy == "auto" and (bool(stated) if stated is not None else own is not None))
    if wanted:
        loaded.bos_id = known if own is None else own
        if loaded.bos_id is None:
            raise CheckpointError(f"tokenizer {loaded.name} has no BOS token to put before the prompt: use bos=no")
    loaded.eos_id = _special(loaded, settings, "eos", _EOS_NAMES)
