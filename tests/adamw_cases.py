"""Steps of AdamW with either kind of moments, by a kernel or by its twin."""

from dataclasses import dataclass

import torch
from bpo_fast_kernels.adamw import AdamW, Stepped, adamw_, adamw_reference_
from bpo_fast_kernels.adamw_moments import KINDS, new_state

SHAPES = [(1,), (255,), (256,), (3, 257), (5, 1, 211), (4, 1024), (0,)]
FORM = AdamW(lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
STATES = tuple(KINDS)


@dataclass(frozen=True)
class Steps:
    """The operator, by its kernels or by its twin, and what it steps on.

    Attributes:
        states: "float32" or "8bit".
        dtype: of gradients; narrow ones have a narrow weight.
        options: of the operator; None: the twin.
    """

    states: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    form: AdamW = FORM
    options: dict | None = None

    def narrow(self, weight):
        """NaN, of the type of gradients; None where that is float32."""
        return None if self.dtype == torch.float32 else torch.full_like(weight, torch.nan, dtype=self.dtype)

    def step(self, weight, grad, state, **scalars):
        """One step, whose gradient comes in float32; a narrow weight of a state is "rounded" in it."""
        self.step_all([(weight, grad, state)], **scalars)

    def step_all(self, tensors, **scalars):
        """One step of several, each as in `step`."""
        step = adamw_reference_ if self.options is None else adamw_
        stepped = [
            Stepped(
                weight,
                grad.to(self.device, self.dtype),
                {key: value for key, value in state.items() if key != "rounded"},
                state.get("rounded"),
            )
            for weight, grad, state in tensors
        ]
        step(stepped, self.form, **scalars | (self.options or {}))

    def start(self, shape):
        """(weight, state) before the first step."""
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(self.device)
        narrow = self.narrow(weight)
        return weight, new_state(weight, self.states) | ({} if narrow is None else {"rounded": narrow})

    def trained(self, shape, num=4):
        """(weight, state) after steps of gradients of unlike sizes, zeros among them."""
        generator = torch.Generator().manual_seed(1 + sum(shape))
        weight, state = self.start(shape)
        for i in range(num):
            grad = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 2, shape, generator=generator)
            grad = grad.where(torch.rand(shape, generator=generator) > 0.1, 0.0)
            scale = torch.tensor(1.0 + i, device=self.device)
            self.step(weight, grad, state, grad_scale=scale, found_inf=torch.zeros((), device=self.device))
        return weight, state

    def trained_together(self, num=3):
        """[(weight, state)] after steps of tensors of many shapes at once."""
        tensors = [self.start(shape) for shape in SHAPES]
        for i in range(num):
            generator = torch.Generator().manual_seed(i)
            grads = [torch.randn(weight.shape, generator=generator) for weight, _ in tensors]
            self.step_all([(weight, grad, state) for (weight, state), grad in zip(tensors, grads, strict=True)])
        return tensors

    def trained_apart(self):
        """The same, of sizes and addresses that 16 divides or not, in launches with and without the latter."""
        tensors = []
        for size, offset in ((512, 0), (512, 1), (511, 0), (511, 1)):
            weight = torch.linspace(-1, 1, size + offset, device=self.device)
            narrow = self.narrow(weight)
            state = new_state(weight[offset:], self.states)
            state |= {} if narrow is None else {"rounded": narrow[offset:]}
            tensors.append((weight[offset:], state))
        grad = torch.linspace(-2, 2, 512)
        for chosen in (tensors[:1], tensors[:2], tensors):
            self.step_all([(weight, grad[: len(weight)], state) for weight, state in chosen])
        return tensors

    def trained_with_a_nan(self):
        """(weight, state) after steps, one with a NaN among its gradients: it stays with its element, 0 here."""
        weight, state = self.trained((3, 257))
        for odd in (float("nan"), 1.0):
            grad = torch.linspace(-1, 2, 771).view(3, 257)
            grad[0, 9] = odd
            self.step(weight, grad, state)
        tensors = [weight, *(t for t in state.values() if t.shape == weight.shape)]
        assert all(t.isnan().nonzero().tolist() == [[0, 9]] for t in tensors)
        for t in tensors:
            t.nan_to_num_(0.0)
        return weight, state

    def unmoved_by_what_is_not_finite(self):
        """Whether a step changes nothing where `found_inf` says so."""
        weight, state = self.trained((700,))
        tensors = [weight, *state.values()]
        before = [t.clone() for t in tensors]
        self.step(weight, torch.full((700,), torch.inf), state, found_inf=torch.ones((), device=self.device))
        return all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def assert_alike(found, expected, *, few=0.0):
    """Weights and moments to rounding; codes to the tie of a rounding, which moves one by one.

    At the next step that one moves a weight and, where it is the largest of its block, the scale: of 8 bits a share of
    `few` numbers may be others, of weights up to 2e-3.
    """
    (weight, state), (wanted, wanted_state) = found, expected
    few = few if "exp_avg_scale" in wanted_state else 0.0
    torch.testing.assert_close(weight.cpu(), wanted.cpu(), rtol=1e-5, atol=2e-3 if few else 5e-5)

    def assert_near(own, tensor, name, **limits):
        off = ~torch.isclose(own, tensor, **limits)
        assert int(off.sum()) <= few * off.numel(), name

    assert_near(weight.cpu(), wanted.cpu(), "weight", rtol=1e-5, atol=5e-5)
    assert state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        own, tensor = state[name].cpu(), tensor.cpu()
        assert own.dtype == tensor.dtype, name
        assert own.shape == tensor.shape, name
        if name == "rounded":
            assert torch.equal(own, weight.cpu().to(own.dtype))
        elif tensor.dtype == torch.int8:
            off = (own.int() - tensor.int()).abs()
            assert int((off > 1).sum()) <= few * off.numel(), name
            assert int((off > 0).sum()) <= 2 + 0.01 * off.numel(), name
        else:
            assert_near(own, tensor, name, rtol=1e-5, atol=1e-6 if name == "exp_avg" else 0)
