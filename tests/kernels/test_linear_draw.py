import pytest
import torch
import torch.nn.functional as F
from bpo_fast_kernels import linear_draw
from bpo_fast_kernels.linear_draw import linear_draw_reference
from cases import adversarial_cases, pairwise, peaked_case, random_case

BACKENDS = ("torch", "native")
# 32 is the panel of the native kernels with AVX-512, 112 their largest block of a vocabulary; "torch" has logits of 14
# rows of 70,001 tokens at a time
SHAPES = [(0, 5, 7), (1, 1, 1), (1, 3, 2), (31, 17, 113), (32, 32, 112), (33, 33, 225), (70, 48, 1000), (5, 900, 300)]
SHAPES += [(15, 8, 70001)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"temperature": 0.7}, {"temperature": 1.3, "logit_softcap": 5.0}]


def logps_of(case, *, temperature=1.0, logit_softcap=None):
    """[T, V] float64."""
    logits = F.linear(case.hidden.double(), case.weight.double())
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return (logits / temperature).log_softmax(-1)


def assert_drawn(found, uniforms, logps, slack):
    """Each number lies in its token's share of the distribution, or `slack` beside it."""
    tokens, own = found
    above = logps.exp().cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
    mass = logps.gather(1, tokens[:, None]).squeeze(1)
    assert bool((mass > -torch.inf).all())
    assert float((own - mass).abs().max()) < 1e-4
    assert float((uniforms - above).max()) < slack
    assert float((above - mass.exp() - uniforms).max()) < slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype", "options"), pairwise(SHAPES, FLOATS, OPTIONS))
def test_draws_are_the_inverse_transform_of_the_whole_vocabulary(backend, shape, options, dtype):
    case, uniforms = random_case(*shape, spread=3.0, dtype=dtype), torch.rand(shape[0], dtype=torch.float64)
    tokens, logps = linear_draw(case.hidden, case.weight, uniforms, backend=backend, **options)
    wanted = logps_of(case, **options)
    assert (tokens.dtype, logps.dtype, len(tokens)) == (torch.int64, torch.float32, shape[0])
    if shape[0]:
        assert_drawn((tokens, logps), uniforms, wanted, 1e-6)
    likeliest, own = linear_draw(case.hidden, case.weight, None, backend=backend, **options)
    assert torch.equal(likeliest, wanted.argmax(-1))  # options change no order
    assert torch.allclose(own.double(), wanted.amax(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", adversarial_cases())
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_at_the_limits(backend, name, dtype):
    case = adversarial_cases(dtype)[name]
    uniforms = torch.rand(len(case.hidden), dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert_drawn(linear_draw(case.hidden, case.weight, uniforms, backend=backend), uniforms, logps_of(case), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [random_case, peaked_case])
def test_16_bit_inputs(backend, dtype, make):
    case, uniforms = make(70, 65, 501, dtype=dtype), torch.rand(70, dtype=torch.float64)
    assert_drawn(linear_draw(case.hidden, case.weight, uniforms, backend=backend), uniforms, logps_of(case), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_gets_its_share(backend):
    """Of 4,000 numbers at equal distances, one row's tokens get as many as they have of the distribution."""
    case, num = random_case(1, 8, 150, spread=1.5), 4000
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    tokens, _ = linear_draw(case.hidden.expand(num, -1), case.weight, uniforms, backend=backend)
    counts = torch.bincount(tokens, minlength=150)
    assert float((counts - num * logps_of(case)[0].exp()).abs().max()) < 1.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(backend):
    case, uniforms = random_case(70, 48, 1000), torch.rand(70, dtype=torch.float64)
    tokens, logps = linear_draw(case.hidden, case.weight, uniforms, backend=backend)
    again = linear_draw(case.hidden, case.weight, uniforms, backend=backend)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], logps)
    some = linear_draw(case.hidden[40:47], case.weight, uniforms[40:47], backend=backend)
    assert torch.equal(some[0], tokens[40:47])
    if backend == "native":  # a library's products may round a row otherwise beside others
        assert torch.equal(some[1], logps[40:47])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_blocks_that_hold_next_to_nothing(uniform):
    """All but one token lie as far below it as float32 can't hold; a number of 0 falls on the first of some mass."""
    logits = torch.tensor([[-95.0], [-145.0]]).repeat(1, 300)
    logits[:, 280] = 0.0
    uniforms = torch.full((2,), uniform, dtype=torch.float64)
    tokens, logps = linear_draw(logits, torch.eye(300), uniforms, backend="native")
    assert [int(t) for t in tokens] == [0 if uniform == 0 else 280] * 2
    assert bool((logps <= 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show_in_the_log_prob(backend, value):
    case = random_case(3, 8, 150)
    case.hidden[1] = value
    tokens, logps = linear_draw(case.hidden, case.weight, torch.full((3,), 0.5, dtype=torch.float64), backend=backend)
    assert logps.isfinite().tolist() == [True, False, True]
    assert bool(((tokens >= 0) & (tokens < 150)).all())


def test_the_twin():
    case, uniforms = random_case(50, 16, 300), torch.rand(50, dtype=torch.float64)
    found = linear_draw_reference(case.hidden.double(), case.weight.double(), uniforms, temperature=0.7)
    assert_drawn(found, uniforms, logps_of(case, temperature=0.7), 1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden.shape = \[3\]: expected two dimensions"),
        ({"weight": torch.zeros(9, 5)}, r"weight.shape = \[9, 5\]: expected \[V, 4\]"),
        ({"uniforms": torch.zeros(3)}, "uniforms.dtype = torch.float32: expected torch.float64"),
        ({"uniforms": torch.zeros(2, dtype=torch.float64)}, r"uniforms.shape = \[2\]: expected \[3\]"),
        *(
            ({"uniforms": torch.tensor([0.5, bad, 0.5]).double()}, f"uniforms = {bad}: expected 0 <= number < 1")
            for bad in (-0.25, 1.0, float("nan"))
        ),
        ({"temperature": 0.0}, "temperature = 0.0: expected a number above 0 that float32 holds"),
        ({"backend": "cuda"}, "backend = 'cuda': expected one of"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "uniforms": None} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_draw(given.pop("hidden"), given.pop("weight"), given.pop("uniforms"), **given)
