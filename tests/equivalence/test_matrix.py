"""Every Keras feature on every strategy has the results of one device: `docs/equivalence.md`."""

import pytest

from equivalence import optimizers
from equivalence.columns import column
from equivalence.document import all_cells, figure, name_of, read, render


# Of a train_step that does not call Keras's: right on a pipe mesh, and said to be slow.
@pytest.mark.filterwarnings("ignore:The train_step of .* is no pipeline")
# Of a model whose layers all communicate, as the two of `data.mlp` on a tensor axis.
@pytest.mark.filterwarnings("ignore:jit_compile=True has no effect on the model")
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            id=f"{cell.feature.title.replace('`', '')}-{cell.column}",
            marks=[pytest.mark.nightly] if cell.nightly else [],
        )
        for cell in all_cells()
    ],
)
def test_feature_has_the_results_of_one_device(cell, record_cell):
    """Fails as the docstring of the feature's script says."""
    difference = cell.feature.measure(column(cell.column))
    record_cell(cell, difference)
    assert difference <= cell.feature.tolerance.limit


def test_every_optimizer_of_keras_is_a_feature():
    """Fails when an upgrade of Keras brings an optimizer that no cell trains with."""
    named = {title.partition(",")[0] for title in optimizers.OPTIMIZERS}
    assert named == optimizers.public_optimizers()


def test_titles_tell_features_apart():
    """Fails if two rows of the document have one name, of which a figure would be lost."""
    names = [name_of(cell) for cell in all_cells()]
    assert len(names) == len(set(names))


def test_the_document_is_read_as_it_was_written():
    """Fails if the check of the committed document is blind to rows, notes or strategies."""
    figures = {name_of(cell): figure(2e-16, cell.nightly) for cell in all_cells()}
    assert read(render(figures)) == figures
