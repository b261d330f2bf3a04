"""How much memory a pass over a model takes, without the memory: on PyTorch's meta device.

The very code of the pass runs there, on tensors that have shapes and no values, and the bytes of
all tensors that are alive are counted. So nothing is guessed of the architecture.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live.

    What there was before, such as weights, does not count. Where code asks for a value of a tensor
    on the meta device, a truth value is True, a number 0, and no two
    tensors or entries are equal.

    Attributes:
        live: bytes of what lives now.
        peak: the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own business
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation and count what it makes."""
        arguments = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for tensor in arguments:
            self._note(tensor, is_new=False)
        if arguments and arguments[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - no other name
                return True if arguments[0].dtype == torch.bool else 0
            if func is torch.ops.aten.equal.default:
                return False
            if func is torch.ops.aten._unique2.default:  # noqa: SLF001 - no other name
                return self._all_differ(arguments[0])
        options = dict(kwargs or {})
        if options.get("device") is not None and arguments and arguments[0].is_meta:
            options["device"] = arguments[0].device  # copies to the host count as if they stayed
        result = func(*args, **options)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, is_new=True)
        return result

    def _all_differ(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.empty(tensor.shape, dtype=torch.int64, device=tensor.device)
        return tensor.flatten(), places, places.flatten()

    def _note(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - what tells storages apart
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes() if is_new else 0
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(repeats, dim=-3) for each in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    if dropout_p and not torch.cuda.is_available():  # the CPU's kernel has no dropout
        whole = torch.ops.aten._scaled_dot_product_attention_math  # noqa: SLF001 - no other name
        attended: Tensor = whole(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
        return attended
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - no other name
    result: Tensor = attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention on paper be what the fused kernels of CPU and CUDA are: no matrix of all pairs.

    But with a dropout on a CPU, whose kernel has none.

    By replacing the function: a mode of torch's would not be in force within a backward pass, where
    blocks are computed again.
    """
    whole = functional.scaled_dot_product_attention

    def attend(query: Tensor, *others: Any, **options: Any) -> Tensor:
        return (_attend if query.is_meta else whole)(query, *others, **options)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = whole


@contextmanager
def counting() -> Iterator[LiveBytes]:
    """Count what the tensors take that are made meanwhile; all of a mask counts as not zero."""
    with (
        symbolic.patch(meta_nonzero_assume_all_nonzero=True),  # type: ignore[attr-defined]
        LiveBytes() as live,
        _fused_attention(),
    ):
        yield live


def weight_bytes(model: nn.Module) -> int:
    """Return what the weights and buffers of a model take, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that lived at once in some work on the meta device."""
    with counting() as live:
        work()
    return live.peak
