#!/usr/bin/env python3
"""Writes docs/performance.md and docs/performance/ from the results of `vattn bench`: no figure there is typed by hand.

    python bench/performance.py                      bench/results/*/*.json -> pages and pictures
    python bench/performance.py --check              only: are pages and pictures what the results make?

Every folder of bench/results is a machine's. docs/performance.md says what was found, in sentences and pictures; each
benchmark has a page of its own with all its cases. Files of runs on the fake driver's device are left out, and so are
quick ones. What was never measured has no table and no panel. The parts are in bench/performance_page/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from performance_page.pages import pages, pictures
from performance_page.pictures import digest, digest_of, draw, panels_for
from performance_page.results import Result, read_results

ROOT = Path(__file__).resolve().parents[1]


def write(results: Sequence[Result], docs: Path) -> None:
    """Write what differs, and remove what is no page or picture of these results."""
    (docs / "performance").mkdir(parents=True, exist_ok=True)
    for name, text in pages(results).items():
        (docs / name).write_text(text, encoding="utf-8")
    for name, result in pictures(results).items():
        shown = panels_for(result)
        if digest_of(docs / name) != digest(result.question, shown):
            draw(result.question, shown, docs / name)
    for path in _strangers(results, docs):
        path.unlink()


def differences(results: Sequence[Result], docs: Path) -> list[str]:
    """What is not as the results make it, a line each."""
    made = pages(results)
    found = [
        name
        for name, text in made.items()
        if not (docs / name).is_file() or (docs / name).read_text(encoding="utf-8") != text
    ]
    found += [
        name
        for name, result in pictures(results).items()
        if digest_of(docs / name) != digest(result.question, panels_for(result))
    ]
    return found + [f"{path.relative_to(docs)}: of no result" for path in _strangers(results, docs)]


def _strangers(results: Sequence[Result], docs: Path) -> Iterator[Path]:
    known = {*pages(results), *pictures(results)}
    for path in sorted((docs / "performance").glob("*")):
        if str(path.relative_to(docs)) not in known:
            yield path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="where performance.md is")
    parser.add_argument("--check", action="store_true", help="only compare: exit with 1 where something differs")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    if options.check:
        found = differences(results, options.docs)
        for line in found:
            print(f"{options.docs.name}/{line} is not what the results make: run python bench/performance.py")
        return 1 if found else 0
    write(results, options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
