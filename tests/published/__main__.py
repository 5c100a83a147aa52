import sys
from pathlib import Path

from tests.published import DATA_SETS, PAGES
from tests.published.page import ROOT

if sys.argv[1:]:
    name, *runs = sys.argv[1:]
    DATA_SETS[name].take_over(*map(Path, runs))
for path, data in PAGES.items():
    path.write_text(data.page(path))
    print(f"wrote {path.relative_to(ROOT)}")
