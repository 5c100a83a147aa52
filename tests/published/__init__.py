"""What pages say of the published runs, made from the files in deploy/results.

    python -m tests.published                    # writes it into the pages anew
    python -m tests.published quickstart RUN     # first takes results, curves, laws and figures of that run over
    python -m tests.published othello RUN LAYERS # of two runs: what probes and latents tell at each layer

On a page each part stands between `<!-- published: NAME -->` and `<!-- end -->`; a test compares it with what is made
here. Whatever stands outside of these parts is written by hand, and has to be read again after a new run.
"""

from tests.published import architectures, othello, quickstart

DATA_SETS = {"quickstart": quickstart.DATA, "architectures": architectures.DATA, "othello": othello.DATA}
PAGES = {path: data for data in DATA_SETS.values() for path in data.pages}
