"""Documents as rows of token ids, each token scored once, and the questions' prompts: what every engine is given.

Convention. A document's text is tokenized without special tokens, and split into windows of at most `window` predicted tokens. BOS
(where the tokenizer sets one) stands in front of every window, or with `bos: document` in front of the first one alone; then a later
window's first token is predicted from the one before it, and the last window reaches back until it is full, which is the convention of
lm-evaluation-harness' rolling log-likelihood. A chat template's own BOS is not doubled. Without a BOS a document's first token is not
scored. Bits per byte count the UTF-8 bytes of the text whose tokens were scored.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers

from quantkit.errors import EvaluationError
from quantkit.types import Json

SUFFIXES = (".jsonl", ".txt")
PLAIN, TEMPLATE, IN_USER = "plain text, no chat template", "chat template", "chat template, system and tools written into the user's turn"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and how it was made."""

    id: str
    text: str
    labels: Mapping[str, str]  # language, domain
    how: str = PLAIN


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read; from `first` on each is predicted by those before it, and scored."""

    document: int
    ids: tuple[int, ...]
    first: int  # >= 1


@dataclass(frozen=True, slots=True)
class Rows:
    """All documents, tokenized."""

    documents: tuple[Document, ...]
    windows: tuple[Window, ...]
    tokens: tuple[int, ...]  # scored, by document
    bytes: tuple[int, ...]  # of UTF-8 text that those stand for


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        EvaluationError: there is none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("a probe", verbose=False)  # what contradicts itself often opens, and fails at the first text
        return tokenizer
    except Exception as problem:  # tokenizer files fail in as many ways as there are kinds
        raise EvaluationError(f"{folder}: its tokenizer cannot be opened ({' '.join(str(problem).split())[:160]})") from None


def read_documents(paths: Sequence[Path], tokenizer: Any) -> list[Document]:
    """Conversations (`messages`, through the chat template) and texts (`text`) of .jsonl files; a .txt file is one document.

    Raises:
        EvaluationError: a line that is neither, or nothing at all.
    """
    documents: list[Document] = []
    for path in paths:
        if path.suffix == ".txt":
            documents.append(Document(path.stem, _text(path), {}))
            continue
        for place, row in json_lines(path):
            labels: dict[str, str] = {key: str(row[key]) for key in ("language", "domain") if key in row}
            name = str(row.get("id", place))
            if isinstance(row.get("messages"), list):
                text, how = render(row["messages"], row.get("tools"), tokenizer, answer=False)
                documents.append(Document(name, text, labels, how))
            elif isinstance(row.get("text"), str):
                documents.append(Document(name, row["text"], labels))
            else:
                raise EvaluationError(f"{place}: neither messages nor text")
    documents = [document for document in documents if document.text]
    if not documents:
        raise EvaluationError(f"{', '.join(map(str, paths)) or 'documents'}: no text to score")
    doubled = next((name for name, count in Counter(document.id for document in documents).items() if count > 1), None)
    if doubled is not None:  # a stored run knows documents by their names
        raise EvaluationError(f"{', '.join(map(str, paths))}: the id {doubled!r} stands twice")
    return documents


def find_files(place: Path) -> list[Path]:
    """The .jsonl and .txt files of a folder, or one file.

    Raises:
        EvaluationError: there is none.
    """
    found = sorted(path for path in place.glob("*") if path.suffix in SUFFIXES) if place.is_dir() else [place]
    if not found or not all(path.is_file() for path in found):
        raise EvaluationError(f"{place}: no {' or '.join(SUFFIXES)} file there")
    return found


def json_lines(path: Path) -> Iterator[tuple[str, Json]]:
    """(file:line, object) of a .jsonl file.

    Raises:
        EvaluationError: a line that is no JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise EvaluationError(f"{place}: no JSON") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{place}: an object is expected")
        if not all(isinstance(turn, dict) for turn in row.get("messages") or ()) or not isinstance(row.get("tools") or [], list):
            raise EvaluationError(f"{place}: messages and tools are lists of objects")
        yield place, row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise EvaluationError(f"{path}: not a text in UTF-8 ({problem.reason} at byte {problem.start})") from None


def render(messages: Sequence[Json], tools: Any, tokenizer: Any, answer: bool) -> tuple[str, str]:
    """A conversation as the model is served it, and which form that took.

    The chat template gets messages and tools as they are. Where it refuses or drops part of them, tools and system text are written into
    the first user's turn. Without a template, contents follow each other.

    Args:
        answer: end where the model is to speak.

    Raises:
        EvaluationError: a template that refuses both forms.
    """
    tools, turns = list(tools or []), [dict(message) for message in messages]
    if not getattr(tokenizer, "chat_template", None):
        parts = [json.dumps(tool, ensure_ascii=False) for tool in tools] + [_content(turn) for turn in turns]
        return "\n\n".join(parts) + ("\n\n" if answer else ""), PLAIN
    refusal = "it drops part of the messages"
    for how, these, given in ((TEMPLATE, turns, tools), (IN_USER, _two_roles(turns, tools), [])):
        try:
            text = str(tokenizer.apply_chat_template(these, tools=given or None, tokenize=False, add_generation_prompt=answer))
        except Exception as problem:  # templates raise whatever they like
            refusal = " ".join(str(problem).split())[:160]
            continue
        names = [tool["function"]["name"] for tool in given]
        if all(name in text for name in names) and all(_squeezed(_content(turn, calls=False)) in _squeezed(text) for turn in these):
            return text, how
    raise EvaluationError(f"the chat template refuses a conversation ({refusal})")


def make_rows(
    documents: Sequence[Document], tokenizer: Any, window: int, bos: Literal["window", "document"] = "window", most: int | None = None
) -> Rows:
    """Windows of all documents; of each at most `most` tokens."""
    windows: list[Window] = []
    tokens, sizes = [], []
    start = begins_with(tokenizer)
    for number, document in enumerate(documents):
        ids, size = encode(document.text, tokenizer, start, most)
        found = list(split(ids, window, bos, start))
        windows += [Window(number, *one) for one in found]
        tokens.append(sum(len(row) - first for row, first in found))
        sizes.append(size)
    if not sum(tokens):
        raise EvaluationError("the documents hold no token to predict")
    return Rows(tuple(documents), tuple(windows), tuple(tokens), tuple(sizes))


def begins_with(tokenizer: Any) -> int | None:
    """The BOS that this tokenizer sets or its chat template writes; None where the model was not trained with one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    template = str(getattr(tokenizer, "chat_template", None) or "")
    sets = list(tokenizer("a")["input_ids"])[:1] == [bos]
    return bos if sets or "bos_token" in template or str(tokenizer.bos_token) in template else None


def encode(text: str, tokenizer: Any, start: int | None, most: int | None = None) -> tuple[list[int], int]:
    """A text's tokens without BOS, at most so many, and the bytes of the text that are scored."""
    if start is not None:
        text = text.removeprefix(str(tokenizer.bos_token))
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:most]
        scored = ids if start is not None else ids[1:]
        return ids, len(tokenizer.decode(scored, clean_up_tokenization_spaces=False).encode())
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = list(encoded["input_ids"])[:most], [end for _, end in encoded["offset_mapping"]][:most]
    begin = 0 if start is not None or not ends else ends[0]
    end = len(text) if len(ids) == len(encoded["input_ids"]) else ends[-1] if ends else 0
    return ids, len(text[begin:end].encode())


def split(ids: Sequence[int], window: int, bos: str, start: int | None) -> Iterator[tuple[tuple[int, ...], int]]:
    """(tokens, first scored) of each window; every token is scored once."""
    front = [] if start is None else [start]
    if bos == "window" and start is not None:
        for at in range(0, len(ids), window):
            yield (start, *ids[at : at + window]), 1
        return
    whole = [*front, *ids]
    for at in range(1, len(whole), window):
        end = min(at + window, len(whole))
        begin = max(min(at, end - window) - 1, 0)
        yield tuple(whole[begin:end]), at - begin


def same_tokens(documents: Sequence[Document], ours: Any, theirs: Any) -> None:
    """Refuse to compare distributions over different tokens.

    Raises:
        EvaluationError: a text that the two tokenizers split otherwise, or different words for a token.
    """
    if ours.get_vocab() != theirs.get_vocab():
        raise EvaluationError("artefact and baseline have different tokenizers; KL and flips need one and the same vocabulary")
    for document in documents:
        one, two = (list(t(document.text, add_special_tokens=False, verbose=False)["input_ids"]) for t in (ours, theirs))
        if one != two:
            raise EvaluationError(f"artefact and baseline tokenize {document.id!r} differently; a baseline of another tokenizer?")


def _content(message: Mapping[str, Any], calls: bool = True) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if calls and message.get("tool_calls"):
        text = "\n".join([text, *(json.dumps(call.get("function", call), ensure_ascii=False) for call in message["tool_calls"])]).strip()
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split()).replace("\\", "")  # spaces are trimmed, JSON is escaped


def _two_roles(turns: Sequence[Json], tools: Sequence[Any]) -> list[Json]:
    """user and assistant alone, tools and system text in front of the first user's words."""
    front = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    merged: list[Json] = []
    for turn in turns:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + _content(turn)
        else:
            merged.append({"role": role, "content": _content(turn)})
    if merged and merged[0]["role"] == "user" and front:
        merged[0]["content"] = "\n".join(front) + "\n\n" + merged[0]["content"]
    elif front:
        merged.insert(0, {"role": "user", "content": "\n".join(front)})
    return merged
