"""Where training data may lie: the forms of `--data-path`, of mixtures, and Psyche's of both.

Facts of PsycheFoundation/psyche, `shared/coordinator/src/model.rs` (locations) and
`shared/data-provider/src/weighted` (mixtures).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from psyche_fast import strict
from psyche_fast.options import Count, Positive, Seed

DUMMY = "dummy:"
"""The path of data that are all zeros, and of a model that is there for trying things out."""
FRESH = "fresh:"
"""What the path of a model begins with that is made, not read: a preset's shape."""
MIXTURE = "mixture:"
"""What a mixture's path may begin with where it does not end with `.json` or `.toml`."""
_WRITTEN_OUT = MIXTURE + "{"

_SCHEMES = ("http", "https", "s3", "gs", "hf")
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1 << 20
_TOKEN_SIZES = {"TwoBytes": 2, "FourBytes": 4}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def scheme(path: str) -> str | None:
    """The scheme of a URL that is read over a network, or None for a path.

    Raises:
        ValueError: a scheme that is not read.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", path)
    if found is None:
        return None
    name = found[1].lower()
    if name not in _SCHEMES:
        raise ValueError(
            f"--data-path {path}: wanted a path or a URL of {', '.join(_SCHEMES)}, not {name}"
        )
    return name


def is_mixture(path: str) -> bool:
    """Whether a path is of a mixture's description."""
    if path.startswith(MIXTURE):
        return True
    end = urlsplit(path).path if "://" in path else path
    return end.endswith((".json", ".toml"))


def mixture_path(parts: list[Any], what: str) -> str:
    """The path of a mixture whose data sets stand in a configuration: `mixture:` and JSON.

    Args:
        parts: tables as of `[[data]]`.
        what: how to call them in an error.

    Raises:
        ValueError: what `read_mixture` refuses.
    """
    read_mixture({"data": parts}, what)
    return MIXTURE + msgspec.json.encode({"data": parts}).decode()


def written_out(path: str) -> dict[str, Any] | None:
    """The description that a path of `mixture_path` holds; None of any other.

    Raises:
        ValueError: not one.
    """
    if not path.startswith(_WRITTEN_OUT):
        return None
    what = f"--data-path {MIXTURE}"
    described: dict[str, Any] = strict.loads(path.removeprefix(MIXTURE), what)
    strict.convert(described, _Ours, what)
    return described


def shown(path: str) -> str:
    """A path of data as a line for people has it."""
    described = written_out(path)
    if described is None:
        return path
    names = []
    for part in described["data"]:
        weight = part.get("weight")
        names.append(part["path"] + ("" if weight is None else f" {weight:g}"))
    return f"a mixture of {', '.join(names)}"


def numbered(path: str) -> list[str]:
    """The paths that `{000..019}` in a path stands for, or the path alone.

    Numbers are padded with zeros to the width of the first.

    Raises:
        ValueError: more than one such range, one that ends before it begins, or too many.
    """
    ranges = list(_NUMBERS.finditer(path))
    if not ranges:
        return [path]
    first, last = int(ranges[0][1]), int(ranges[0][2])
    if len(ranges) > 1 or not first <= last < first + _MOST_FILES:
        raise ValueError(f"--data-path {path}: wanted one range such as {{000..019}}")
    start, end = ranges[0].span()
    width = len(ranges[0][1])
    return [f"{path[:start]}{n:0{width}}{path[end:]}" for n in range(first, last + 1)]


class Source(msgspec.Struct, frozen=True):
    """One data set.

    Attributes:
        path: any form of `--data-path` but a mixture.
        token_size: bytes to a token of token files; None for the run's.
        key: 32 bytes that its order is shuffled with, or None.
    """

    path: str
    token_size: int | None = None
    key: bytes | None = None


class Mixture(msgspec.Struct, frozen=True):
    """Several data sets that are drawn from in turn.

    Attributes:
        sources: them.
        weights: their shares, before they are divided by their sum; None for their lengths.
        key: 32 bytes that the order of all is shuffled with, or None.
        sequence_length: what it has to be, or None.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    key: bytes | None
    sequence_length: int | None = None


def seed_key(seed: int) -> bytes:
    """The 32 bytes that Psyche makes of a seed of 32 bits."""
    return bytes(28) + seed.to_bytes(4, "big")


# Psyche's forms.


class SingleUrl(msgspec.Struct, frozen=True):
    """One file; the form's content is its URL alone."""

    url: str


class NumberedFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files whose URLs differ by a number."""

    url_template: str
    start_index: Count
    n_left_pad_zeros: Annotated[int, Meta(ge=0, lt=256)]
    num_files: Positive


class Gcp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token files of a public bucket, those below a folder or all."""

    bucket_name: str
    filter_directory: str


class HttpData(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Psyche's `Http`."""

    location: Any
    token_size_in_bytes: Literal["TwoBytes", "FourBytes"]
    shuffle: Any


def read_http(data: HttpData, what: str) -> Source:
    """Reads Psyche's `Http`, and `Local` in the same place.

    Raises:
        ValueError: a form that there is not, or a wrong value.
    """
    forms: dict[str, Any] = {
        "SingleUrl": str, "NumberedFiles": NumberedFiles, "Gcp": Gcp, "Local": str,
    }  # fmt: skip
    place = strict.tagged(data.location, forms, f"{what}.location")
    key = read_shuffle(data.shuffle, f"{what}.shuffle")
    if isinstance(place, NumberedFiles):
        if place.url_template.count("{}") != 1:
            raise ValueError(
                f"{what}.location.NumberedFiles.url_template: wanted one {{}} for the number, "
                f"got {place.url_template!r}"
            )
        first, last = place.start_index, place.start_index + place.num_files - 1
        path = place.url_template.replace("{}", f"{{{first:0{place.n_left_pad_zeros}}..{last}}}")
    elif isinstance(place, Gcp):
        path = f"gs://{place.bucket_name}/{place.filter_directory}"
    else:
        path = place
    ((form, _),) = data.location.items()
    if not place or (isinstance(place, Gcp) and not place.bucket_name):
        raise ValueError(f"{what}.location.{form} must not be empty")
    if form != "Local" and scheme(path) is None:
        raise ValueError(f"{what}.location.{form}: wanted a URL, got {path!r}")
    return Source(path, _TOKEN_SIZES[data.token_size_in_bytes], key)


def write_http(source: Source) -> dict[str, Any] | None:
    """Psyche's `Http` of a source, or None where it has none."""
    kind = scheme(source.path)
    place: dict[str, Any]
    numbers = _NUMBERS.search(source.path)
    if kind == "gs":
        bucket, _, folder = source.path.removeprefix("gs://").partition("/")
        place = {"Gcp": {"bucket_name": bucket, "filter_directory": folder}}
    elif kind not in ("http", "https") or is_mixture(source.path):
        return None
    elif numbers is None:
        place = {"SingleUrl": source.path}
    else:
        place = {
            "NumberedFiles": {
                "url_template": source.path.replace(numbers[0], "{}"),
                "start_index": int(numbers[1]),
                "n_left_pad_zeros": len(numbers[1]),
                "num_files": len(numbered(source.path)),
            }
        }
    return {
        "location": place,
        "token_size_in_bytes": "FourBytes" if source.token_size == 4 else "TwoBytes",
        "shuffle": "DontShuffle" if source.key is None else {"Seeded": list(source.key)},
    }


def read_shuffle(value: Any, what: str) -> bytes | None:
    """The key of Psyche's `DontShuffle` or `{"Seeded": [32 bytes]}`.

    Raises:
        ValueError: another form or content.
    """
    if value == "DontShuffle":
        return None
    numbers = strict.tagged(value, {"Seeded": list[int]}, what)
    if len(numbers) != 32 or not all(0 <= number < 256 for number in numbers):
        raise ValueError(f"{what}.Seeded: wanted 32 numbers from 0 to 255, got {numbers}")
    return bytes(numbers)


def location_path(form: str, content: Any, what: str) -> str:
    """The path of Psyche's `Local`, `Preprocessed` or `WeightedHttp`.

    Args:
        form: which of them.
        content: its content.
        what: how to call it in an error.

    Raises:
        ValueError: it is empty.
    """
    if not content:
        raise ValueError(f"{what}.{form} must not be empty")
    if form == "WeightedHttp" and not is_mixture(content):
        return MIXTURE + content
    if form == "Preprocessed" and _HUB_ID.fullmatch(content):
        from pathlib import Path

        if not Path(content).exists():
            return f"hf://datasets/{content}"
    return str(content)


# Descriptions of mixtures.


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of `[[data]]`."""

    path: str
    weight: float | None = None
    token_size: Literal[2, 4] | None = None
    seed: Seed | None = None


class _Ours(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    data: list[_Part]
    seed: Seed | None = None


class _Psyches(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    shuffle: Any
    providers: list[Any]


class _Served(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What Psyche's data server is started with (`data.toml`)."""

    dir: str
    token_size: Literal["TwoBytes", "FourBytes"]
    seq_len: Positive
    shuffle_seed: list[int]


class _Weighted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    location: Any
    weight: float = 1.0


def read_mixture(obj: Any, what: str) -> Mixture:
    """Reads a mixture: `data` with `path` and `weight`, or one of Psyche's three forms.

    Psyche's are `{"shuffle": ..., "providers": [...]}`, with an Http location each or pairs of one
    and its weight; a list of `{"location": ..., "weight": ...}`; and what its data server serves,
    which is a mixture of one.

    Raises:
        ValueError: another form, a wrong value, or weights of some data sets only.
    """
    if isinstance(obj, list):
        entries = [strict.convert(entry, _Weighted, f"{what}[{n}]") for n, entry in enumerate(obj)]
        places = [_any_location(e.location, f"{what}[{n}]") for n, e in enumerate(entries)]
        return _mixture(places, [e.weight for e in entries], None, what)
    if isinstance(obj, dict) and "providers" in obj:
        psyches = strict.convert(obj, _Psyches, what)
        places, weights = [], []
        for n, provider in enumerate(psyches.providers):
            where = f"{what}: providers[{n}]"
            weight = None
            if isinstance(provider, list):
                if len(provider) != 2:
                    raise ValueError(f"{where}: wanted a location and its weight, got {provider}")
                provider, weight = provider
                weight = strict.convert(weight, float, f"{where}: weight")
            places.append(read_http(strict.convert(provider, HttpData, where), where))
            weights.append(weight)
        key = read_shuffle(psyches.shuffle, f"{what}: shuffle")
        return _mixture(places, weights, key, what)
    if isinstance(obj, dict) and "dir" in obj:
        served = strict.convert(obj, _Served, what)
        key = read_shuffle({"Seeded": served.shuffle_seed}, f"{what}: shuffle_seed")
        source = Source(served.dir, _TOKEN_SIZES[served.token_size], key)
        return Mixture((source,), None, None, served.seq_len)
    ours = strict.convert(obj, _Ours, what)
    places = [
        Source(part.path, part.token_size, None if part.seed is None else seed_key(part.seed))
        for part in ours.data
    ]
    key = None if ours.seed is None else seed_key(ours.seed)
    return _mixture(places, [part.weight for part in ours.data], key, what)


def _any_location(value: Any, what: str) -> Source:
    if value == "Dummy":
        return Source(DUMMY)
    forms: dict[str, Any] = {"Local": str, "Preprocessed": str, "Http": HttpData}
    content = strict.tagged(value, forms, f"{what}.location")
    if isinstance(content, HttpData):
        return read_http(content, f"{what}.location.Http")
    ((form, _),) = value.items()
    return Source(location_path(form, content, f"{what}.location"))


def _mixture(
    sources: list[Source], weights: list[float | None], key: bytes | None, what: str
) -> Mixture:
    if not sources:
        raise ValueError(f"{what}: a mixture of no data sets")
    given = tuple(weight for weight in weights if weight is not None)
    if len(given) not in (0, len(sources)):
        raise ValueError(f"{what}: wanted weights of all data sets or none, got {weights}")
    if given and (min(given) < 0 or sum(given) <= 0):
        raise ValueError(f"{what}: weights must be 0 or more, and one over 0, got {list(given)}")
    for source in sources:
        if is_mixture(source.path):
            raise ValueError(f"{what}: {source.path} is a mixture itself: name its data sets here")
    return Mixture(tuple(sources), given or None, key)
