"""tokenizer.model: the vocabulary of the `sentencepiece` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import RillError
from engine.text.detokenizer import ByteStream, TextStream
from engine.text.vocab import MARKUP, Control, Part, token_pattern


class SentencePieceVocab:
    """A SentencePiece model, with the tokens that tokenizer_config.json adds: `added`, id to (text, special).

    `legacy`: text after a control token gets a dummy prefix too, as in Llama 2's own code.
    Raises RillError for what is no such model; `name` is the file, for messages.
    """

    SPACE = "\u2581"

    def __init__(
        self, model: bytes, name: str, added: Mapping[int, tuple[str, bool]], legacy: bool = True
    ) -> None:
        from sentencepiece import SentencePieceProcessor

        # a serialised message may repeat a field to change it: normalizer_spec { add_dummy_prefix: false }
        no_prefix = model + b"\x1a\x02\x18\x00"
        try:
            self._pieces = SentencePieceProcessor(model_proto=model)
            self._inner = SentencePieceProcessor(model_proto=no_prefix)
            count = self._pieces.get_piece_size()
        except Exception:
            count = 0
        if not count:
            raise RillError(f"{name}: is neither a SentencePiece model nor a tiktoken file")
        self._legacy = legacy
        self._added = {i: text for i, (text, _) in added.items() if i >= count}
        self.size = max([count - 1, *self._added]) + 1
        ids = range(count)
        self.special_ids = frozenset(i for i in ids if self._pieces.is_control(i)) | {
            i for i, (_, special) in added.items() if special and not self._is_unknown(i)
        }
        self.controls = self._find_controls(count, added)
        symbols = [text for text, i in self.controls.items() if i < count and i not in self.special_ids]
        self._symbols = token_pattern(symbols)
        self.eos_ids = frozenset(i for i in [self._pieces.eos_id()] if i >= 0)
        self.prefix_ids = [i for i in [self._pieces.bos_id()] if i >= 0]
        self._strip = 1 if self._pieces.decode_pieces([self.SPACE + "a"]) == "a" else 0

    def id_of(self, token: str) -> int | None:
        if token in self.controls:
            return self.controls[token]
        found = int(self._pieces.piece_to_id(token))
        return found if self._pieces.id_to_piece(found) == token else None

    def encode(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += [part.id] if isinstance(part, Control) else self._plain(part, index == 0 or self._legacy)
        return ids

    def text_stream(self, after: Sequence[int], skip_special: bool) -> TextStream:
        hidden = self.special_ids if skip_special else frozenset()
        continues = any(i not in hidden and self.token_bytes(i) for i in after)
        return ByteStream(self.size, hidden, self.token_bytes, 0 if continues else self._strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, b"" for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id >= self._pieces.get_piece_size():
            return b""
        piece: str = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._is_unknown(token_id):
            return str(self._pieces.decode([token_id])).encode()
        return piece.replace(self.SPACE, " ").encode()

    def _plain(self, text: str, prefix: bool) -> list[int]:
        """Encode text; the library takes user-defined symbols as tokens, so cut those in two."""
        cuts = [m.start() + 1 for m in self._symbols.finditer(text)]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            pieces = self._pieces if prefix and start == 0 else self._inner
            ids += pieces.encode(text[start:end])
        return ids

    def _is_unknown(self, token_id: int) -> bool:
        return bool(token_id == self._pieces.unk_id())

    def _find_controls(self, count: int, added: Mapping[int, tuple[str, bool]]) -> dict[str, int]:
        controls = {}
        for i in range(count):
            piece = self._pieces.id_to_piece(i)
            symbol = MARKUP.fullmatch(piece) and self._inner.encode(piece) == [i]  # user-defined
            if self._pieces.is_control(i) or symbol:
                controls[piece] = i
        for i, (text, special) in added.items():
            if text and (special or MARKUP.fullmatch(text)) and not self._is_unknown(i):
                controls[text] = i
        return controls
