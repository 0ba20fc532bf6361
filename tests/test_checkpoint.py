"""The files of the moments: of one rank or of several, in their order, and all of them."""

import pytest

from bpo_fast.checkpoint import moment_files


@pytest.mark.parametrize("size", [1, 2, 11])
def test_moments_of_all_ranks_are_found_in_their_order(tmp_path, size):
    names = ["optimizer.safetensors"] if size == 1 else [f"optimizer-{r}-of-{size}.safetensors" for r in range(size)]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in moment_files(tmp_path)] == names
    (tmp_path / names[-1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[-1]}: missing"):
        moment_files(tmp_path)
