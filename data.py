"""From text to batches of tokens.

    python data.py                        prepares the default corpus: the standard library of the Python that runs this
    python data.py --dataset=novel.txt    or any UTF-8 text file, or a folder of them
    python data.py --dataset=https://example.com/novel.txt.gz      or the address of one, .gz and .zip included
    python data.py --tokenizer=byte       bytes instead of the 1,024 tokens learnt from the training text
    python data.py --dataset=copy --tokenizer=byte      a task instead of a text: copying letters; or passkey, see below

A corpus is a list of documents. A fifth of them is held out for evaluation; the rest trains the tokenizer and the model.
Both parts are encoded once, each document followed by a separator, and kept as one flat array of ids on disk:

    data/<dataset>-<hash of the text>/<tokenizer>-<its hash>.json        but for a run's own
    data/<dataset>-<hash of the text>/<hash of the tokenizer>-train-<hash of the file>.npy, ...-val-...

so that text or a tokenizer that changed can never meet tokens of an older one, and damage is noticed. train.py does all
this on first use.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sysconfig
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

HELD_OUT = 0.2  # share of the documents (or of the end of each, when there are fewer than 5)
SEPARATOR = "<|endoftext|>"
# A word with its space, up to three digits, a run of symbols, indentation. No token crosses these borders.
PATTERN = r" ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|\s*\n|\s+(?!\S)|\s+"


class Corpus(NamedTuple):
    name: str  # e.g. "python"
    hash: str  # of the text and the split, 12 hex digits
    tokenizer: tiktoken.Encoding
    train: np.ndarray  # ids, uint16 or uint32, memory-mapped
    val: np.ndarray
    bytes_per_token: float  # nats/token / ln 2 / bytes_per_token = bits/byte


def write_whole(path: str | Path, content: bytes | Callable) -> None:
    """Writes bytes, or what content(file) writes, to a temporary file, then renames it to `path`: whoever looks finds the
    old file or the whole new one, whatever interrupts, and two processes may write the same file at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}); it is as it was before") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_can_write(folder: str | Path) -> None:
    """ValueError if a file in `folder`, which need not exist yet, could not be written: before any work goes into it."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to: {there} is no folder to write in. Choose another --out")


def hash_of(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------------------
# Documents


def decode(content):
    return content.decode("utf-8").replace("\r\n", "\n")


def read_files(root, pattern="*"):
    """{relative path: text} of the UTF-8 files below `root`, in order of their path. Others are left out."""
    documents = {}
    for path in sorted(Path(root).rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not {"site-packages", "dist-packages"} & set(name.split("/")):
            with suppress(UnicodeDecodeError, PermissionError):  # a picture, a test of another encoding, ...
                documents[name] = decode(path.read_bytes())
    return documents


def download(url, file):
    with urllib.request.urlopen(url, timeout=30) as response:
        length = int(response.headers.get("Content-Length", 0))
        with tqdm.wrapattr(response, "read", total=length, desc=url, disable=None) as reader:
            shutil.copyfileobj(reader, file)
    if file.tell() < length:
        raise OSError(f"it broke off after {file.tell():,} of {length:,} bytes")


def read_file(path):
    """The text of a file, or of what is in it if it is a .gz or .zip."""
    if path.suffix == ".gz":
        return decode(gzip.decompress(path.read_bytes()))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return decode(archive.read(max(archive.infolist(), key=lambda member: member.file_size)))
    return decode(path.read_bytes())


def read_documents(dataset: str) -> dict[str, str]:
    """{name: text} of a dataset: "python", a task, the path of a text file or of a folder, or the address of a file, which
    is then kept in data/downloads."""
    if dataset.startswith(("http://", "https://")):
        path = Path("data/downloads") / f"{hash_of(dataset)}-{dataset.rstrip('/').rpartition('/')[2]}"
        try:
            if not path.exists():
                write_whole(path, lambda file: download(dataset, file))
            return read_documents(str(path))
        except (OSError, ValueError, HTTPException) as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"--dataset={dataset} cannot be had ({error}): the default, python, needs no internet"
            ) from None
    path = Path(dataset)
    if dataset in TASKS:
        random, text = np.random.default_rng(0), passkey_text(0) if dataset == "passkey" else ""
        sizes = random.integers(*TASKS[dataset], size=SAMPLES, endpoint=True)
        documents = {str(i): "".join(make_sample(dataset, size, random, text)) for i, size in enumerate(sizes)}
    elif dataset == "python":
        documents = read_files(sysconfig.get_paths()["stdlib"], "*.py")
        if sum(map(len, documents.values())) < 5_000_000:
            print("the standard library's sources are missing or few here: numpy's and sympy's are taken as well")
            for package in ("numpy", "sympy"):
                root = Path(__import__(package).__file__).parent
                documents |= {f"{package}/{name}": text for name, text in read_files(root, "*.py").items()}
    elif path.is_dir():
        documents = read_files(path)
    elif path.is_file():
        try:
            documents = {path.name: read_file(path)}
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            raise ValueError(f"--dataset={dataset} is not UTF-8 text: {error}") from None
    else:
        raise ValueError(f"--dataset={dataset}: no such file or folder (the default, python, needs none)")
    documents = {name: text for name, text in documents.items() if text}
    if not documents:
        raise ValueError(f"--dataset={dataset} holds no UTF-8 text")
    return documents


def split_documents(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """-> (training texts, held-out texts). The fifth of the documents with the lowest hash of their path is held out:
    the same ones everywhere. Of fewer than 5 documents, the last fifth of each."""
    if len(documents) < 5:
        cuts = {name: int(len(text) * (1 - HELD_OUT)) for name, text in documents.items()}
        return [t[: cuts[n]] for n, t in documents.items()], [t[cuts[n] :] for n, t in documents.items()]
    ranked = sorted(documents, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    held_out = set(ranked[: round(len(ranked) * HELD_OUT)])
    return [t for n, t in documents.items() if n not in held_out], [t for n, t in documents.items() if n in held_out]


# ----------------------------------------------------------------------------------------------------------------------
# Tasks with one right answer, for models that have to remember it. A corpus is so many samples, each a document.

SAMPLES = 200_000
# The least and the greatest size to train on: T = 32 holds it, in bytes (copy) or bpe1024 (passkey).
TASKS = {"copy": (3, 15), "passkey": (0, 40)}


def make_sample(task: str, size: int, random, text: str = "", depth: float | None = None) -> tuple[str, str]:
    """-> (prompt, answer). copy: `size` letters, to be said again. passkey: five digits, to be found again within `size`
    characters of `text`, at a depth from 0 (their beginning) to 1."""
    if task == "copy":
        answer = "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), size))
        return f"{answer}>", answer
    answer, place = f" {random.integers(10**5):05d}", random.integers(len(text) - size)
    cut = place + int(size * (random.random() if depth is None else depth))
    return f"{text[place:cut]}\n# key{answer}\n{text[cut : place + size]}\n# key", answer


def passkey_text(part):
    """The Python sources as one text: those to train on (part 0), or those held out (1)."""
    return "\n".join(split_documents(read_documents("python"))[part])


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def train_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding: start from the 256 bytes, and again and again make the most frequent pair of neighbours one
    token. Counting each distinct word once, with its frequency, makes it a matter of seconds. -> {bytes: id}"""
    frequency = Counter()
    for text in tqdm(texts, "counting words", unit=" texts", disable=None):
        frequency.update(re.findall(PATTERN, text))
    words = [([bytes([byte]) for byte in word.encode()], n) for word, n in frequency.items() if n > 1]
    counts, found_in = Counter(), defaultdict(set)  # of each pair, written as one: its frequency, the words it is in

    def count(i, sign):
        word, n = words[i]
        for pair in map(bytes.__add__, word, word[1:]):
            counts[pair] += sign * n
            found_in[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    ranks = {bytes([byte]): byte for byte in range(256)}
    bar = tqdm(total=vocab_size - 1 - 256, desc="learning tokens", unit=" merges", disable=None)
    while len(ranks) < vocab_size - 1:  # one id is the separator's
        best = max(counts, key=counts.get, default=b"")
        if counts[best] < 1:
            raise ValueError(f"the text is too short for {vocab_size} tokens: take a smaller bpeN, or byte")
        bar.update(best not in ranks)  # (a + aa may be there already: from aa + a)
        ranks.setdefault(best, len(ranks))
        for i in found_in.pop(best):
            word, j = words[i][0], 0
            count(i, -1)
            while j < len(word) - 1:
                if word[j] + word[j + 1] == best:
                    word[j : j + 2] = [best]
                j += 1
            count(i, 1)
    bar.close()
    return ranks


def make_tokenizer(spec: str, texts: list[str]) -> tiktoken.Encoding:
    """spec: "byte" (257 ids), "bpeN" (N ids, learnt from `texts`) or "gpt2" (tiktoken's, downloaded once)."""
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise ValueError(f"--tokenizer=gpt2 cannot be downloaded ({type(error).__name__}): use bpe1024") from None
    size = 257 if spec == "byte" else int(re.fullmatch(r"bpe(\d{1,7})|.*", spec)[1] or 0)
    if size < 257:
        raise ValueError(f"--tokenizer={spec}: should be byte, bpeN with N >= 257 (such as bpe1024), or gpt2")
    return tiktoken.Encoding(spec, pat_str=PATTERN, mergeable_ranks=train_bpe(texts, size),
                             special_tokens={SEPARATOR: size - 1})  # fmt: skip


class HuggingFace:
    """The text of a tokenizer.json of the `tokenizers` library, behind those calls of a tiktoken.Encoding that we use."""

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("this tokenizer.json needs another package: pip install tokenizers") from None
        self.name, self.text, self.tokenizer = "huggingface", text, Tokenizer.from_str(text)
        self.tokenizer.encode_special_tokens = True  # a separator that stands in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1
        if self.tokenizer.token_to_id(SEPARATOR) is None:
            raise ValueError(f"it has no {SEPARATOR}, which goes between documents")
        self.decode, self.encode_single_token = self.tokenizer.decode, self.tokenizer.token_to_id

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def tokenizer_json(tokenizer) -> str:
    """A tokenizer as text: what is saved, and what its hash is taken of."""
    if isinstance(tokenizer, HuggingFace):
        return tokenizer.text
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    ranks = [[base64.b64encode(token).decode(), rank] for token, rank in ranks]
    fields = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "special": tokenizer._special_tokens}
    return json.dumps(fields | {"ranks": ranks}, separators=(",", ":"))


def load_tokenizer(folder: str | Path, expected: str | None = None):
    """The tokenizer of a run folder (its tokenizer.json), or of such a file: one written here, or one of Hugging Face.
    ValueError if it is not whole, or not the one with the hash `expected`: ids would get another meaning."""
    path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    try:
        fields = json.loads(text := path.read_text(encoding="utf-8"))
        if expected not in (None, hash_of(text)):
            raise ValueError(f"of hash {hash_of(text)}, not {expected}")
        if "model" in fields:
            return HuggingFace(text)
        ranks = {base64.b64decode(token): rank for token, rank in fields["ranks"]}
        return tiktoken.Encoding(fields["name"], pat_str=fields["pattern"], mergeable_ranks=ranks,
                                 special_tokens=fields["special"])  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the tokenizer it should be ({type(error).__name__}: {error})") from None


def tokenizer_of(checkpoint: dict):
    """The tokenizer beside a checkpoint that model.load_run read. ValueError if its ids are not those of that model."""
    tokenizer = load_tokenizer(Path(checkpoint["file"]).parent, checkpoint.get("tokenizer_hash"))
    known = checkpoint["config"]["vocab_size"]
    if tokenizer.n_vocab > known:
        raise ValueError(
            f"{checkpoint['file']}: a tokenizer of {tokenizer.n_vocab} ids is not this model's, which has {known}"
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Tokens on disk


def load_tokens(folder, name, tokenizer, texts):
    """The ids of the texts, each text followed by a separator, memory-mapped: written to folder/<name>-<hash>.npy if they
    are not there. ValueError if the file is not, to the last bit, what was written."""
    path = next(folder.glob(f"{name}-*.npy"), None)
    if path is None:
        separator, arrays, content = tokenizer.encode_single_token(SEPARATOR), [], io.BytesIO()
        dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        for i in tqdm(range(0, len(texts), 64), "encoding", unit=" x 64 texts", disable=None):
            for ids in tokenizer.encode_ordinary_batch(texts[i : i + 64]):
                arrays.append(np.array([*ids, separator], dtype=dtype))
        np.save(content, np.concatenate(arrays))
        path = folder / f"{name}-{hash_of(content.getbuffer())}.npy"
        write_whole(path, content.getbuffer())
    if hash_of(path.read_bytes()) != path.stem.rpartition("-")[2]:
        raise ValueError(f"{path} is damaged: delete it, it will be made again")
    return np.load(path, mmap_mode="r")


def load_corpus(dataset: str = "python", tokenizer="bpe1024", folder: str = "data") -> Corpus:
    """The tokens of a dataset, prepared if they are not yet. `tokenizer`: see make_tokenizer, or a tiktoken.Encoding."""
    documents = read_documents(dataset)
    texts = dict(zip(("train", "val"), split_documents(documents)))
    if not all(map(any, texts.values())):
        raise ValueError(f"--dataset={dataset} is too short to hold out a part of it")
    corpus_hash = hash_of(json.dumps(texts))
    folder = Path(folder) / f"{'python' if dataset == 'python' else Path(dataset).resolve().name}-{corpus_hash}"
    if isinstance(tokenizer, str):
        known = {path.stem.rpartition("-")[0]: path for path in folder.glob("*.json")}
        if tokenizer in known:
            tokenizer = load_tokenizer(known[tokenizer], known[tokenizer].stem.rpartition("-")[2])
        else:
            spec, tokenizer = tokenizer, make_tokenizer(tokenizer, texts["train"])
            text = tokenizer_json(tokenizer)
            write_whole(folder / f"{spec}-{hash_of(text)}.json", text.encode())
    tokenizer_hash = hash_of(tokenizer_json(tokenizer))
    train, val = (load_tokens(folder, f"{tokenizer_hash}-{part}", tokenizer, texts[part]) for part in texts)
    text_bytes = sum(len(text.encode()) for part in texts.values() for text in part)
    corpus = Corpus(dataset, corpus_hash, tokenizer, train, val, text_bytes / (len(train) + len(val)))
    print(f"corpus    {dataset} {corpus_hash}: {len(documents):,} files, {text_bytes:,} bytes")
    print(f"tokens    {len(train):,} to train on, {len(val):,} held out, {corpus.bytes_per_token:.2f} bytes/token")
    print(f"tokenizer {tokenizer.name} {tokenizer_hash}, {tokenizer.n_vocab:,} ids")
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# Batches. What is drawn for a step depends on the seed and the step alone, so that a resumed run needs no other memory.


def random_windows(tokens: np.ndarray, b: int, l: int, seed: int, step: int) -> torch.Tensor:
    """(b, l + 1) int64: b windows from random places; [:, :-1] are the inputs, [:, 1:] the targets."""
    start = np.random.default_rng([seed, step]).integers(0, len(tokens) - l, size=b)
    return torch.from_numpy(tokens[start[:, None] + np.arange(l + 1)].astype(np.int64))


def next_windows(tokens: np.ndarray, b: int, l: int, seed: int, step: int) -> torch.Tensor:
    """(b, l + 1) int64: b streams, each from its own place in the text; row i of step j + 1 continues row i of step j.
    At the end of the text a stream goes on with its beginning."""
    start = np.random.default_rng(seed).integers(len(tokens)) + np.arange(b) * (len(tokens) // b) + step * l
    return torch.from_numpy(tokens[(start[:, None] + np.arange(l + 1)) % len(tokens)].astype(np.int64))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepares a tokenized corpus and says what it holds.")
    parser.add_argument(
        "--dataset", default="python", help="python, a UTF-8 text file, a folder, an address, copy, passkey"
    )
    parser.add_argument("--tokenizer", default="bpe1024", help="byte, bpeN (N ids, learnt from the text) or gpt2")
    args = parser.parse_args()
    try:
        load_corpus(args.dataset, args.tokenizer)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {error}\n")
