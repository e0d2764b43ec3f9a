"""The ways to run a pruned network, one function each.

A path writes its file and returns how to run it.  What is added to `PATHS` is measured with the
others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fishleg_jax as flj
from experiments.deploy.subjects import Subject
from experiments.running import processes

Run = Callable[[np.ndarray], np.ndarray]


class Deployed(NamedTuple):
    """A network that is ready to run.

    Attributes:
        run: function from inputs to outputs, both of NumPy.
        file: the file on disk; None where the path has none.
        note: what was found on the way, in words; may be empty.
    """

    run: Run
    file: Path | None
    note: str = ""


Make = Callable[[Subject, Path, int], Deployed]


def _xla(function: Callable[..., Any], *arguments: Any) -> Run:
    compiled = jax.jit(function)
    return lambda inputs: np.asarray(compiled(*arguments, inputs))


def dense_xla(subject: Subject, stem: Path, batch: int) -> Deployed:
    """The network before pruning."""
    file = stem.with_suffix(".safetensors")
    flj.export.save_params(file, subject.dense_params)
    return Deployed(_xla(subject.dense, subject.dense_params), file)


def masked_xla(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Masks that are applied at every call."""
    file = stem.with_suffix(".safetensors")
    flj.export.save_params(file, subject.params, subject.masks)

    def masked(params: Any, masks: Any, inputs: Any) -> Any:
        return subject.pruned(flj.apply_masks(params, masks), inputs)

    return Deployed(_xla(masked, subject.params, subject.masks), file)


def safetensors(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Zeros in the weights, in a file that other programs read."""
    file = stem.with_suffix(".safetensors")
    flj.export.save_params(file, subject.params)
    return Deployed(_xla(subject.pruned, flj.export.load_params(file).params), file)


def _packed(function: Callable, params: Any, stem: Path) -> Deployed:
    file = stem.with_suffix(".packed")
    flj.export.save_params(file, params, packed=True)
    return Deployed(_xla(function, flj.export.load_params(file).params), file)


def packed(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Zeros in the weights, as bitmasks and values."""
    return _packed(subject.pruned, subject.params, stem)


def _onnx(function: Callable, params: Any, subject: Subject, stem: Path) -> Deployed:
    import onnxruntime

    file = stem.with_suffix(".onnx")
    difference = flj.export.to_onnx(function, params, subject.test[0][:4], file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = processes.cores()
    # idle threads would go on spinning while the other paths are timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # it warns of shapes that jax2onnx annotates wrongly
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Deployed(
        lambda inputs: session.run(None, {name: inputs})[0], file, f"{difference:.1e} from JAX"
    )


def onnx_dense(subject: Subject, stem: Path, batch: int) -> Deployed:
    """The network before pruning, in onnxruntime."""
    return _onnx(subject.dense, subject.dense_params, subject, stem)


def onnx_pruned(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Zeros in the weights, in onnxruntime."""
    return _onnx(subject.pruned, subject.params, subject, stem)


def bcsr(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Sparse kernels in dense layers, where the table of this machine says that they pay."""
    example = np.repeat(subject.test[0][:1], batch, axis=0)
    apply = flj.export.sparse_apply(subject.pruned, subject.params, example)
    names = [layer.name for layer in apply.layers if layer.sparse]
    note = f"sparse: {', '.join(names) or 'none'}"
    return Deployed(lambda inputs: np.asarray(apply(inputs)), None, note)


def _jax_export(function: Callable, params: Any, subject: Subject, stem: Path) -> Deployed:
    file = stem.with_suffix(".stablehlo")
    flj.export.save_function(file, function, params, subject.test[0][:1])
    run = flj.export.load_function(file)
    return Deployed(lambda inputs: np.asarray(run(inputs)), file)


def jax_export(subject: Subject, stem: Path, batch: int) -> Deployed:
    """StableHLO with the weights inside."""
    return _jax_export(subject.pruned, subject.params, subject, stem)


def compact_xla(subject: Subject, stem: Path, batch: int) -> Deployed:
    """Half of the operations: physically smaller arrays."""
    file = stem.with_suffix(".safetensors")
    flj.export.save_params(file, subject.small_params)
    note = f"{subject.share:.2f} of the operations"
    return Deployed(_xla(subject.small, subject.small_params), file, note)


def compact_packed(subject: Subject, stem: Path, batch: int) -> Deployed:
    """The same in a packed file, which has no zeros to leave out, but compresses."""
    return _packed(subject.small, subject.small_params, stem)


def compact_jax_export(subject: Subject, stem: Path, batch: int) -> Deployed:
    """The same in StableHLO."""
    return _jax_export(subject.small, subject.small_params, subject, stem)


def compact_onnx(subject: Subject, stem: Path, batch: int) -> Deployed:
    """The same in onnxruntime."""
    return _onnx(subject.small, subject.small_params, subject, stem)


BASE, BCSR = "dense, XLA", "zeros, BCSR where it pays"
PATHS: dict[str, Make] = {
    BASE: dense_xla,
    "masks at every call, XLA": masked_xla,
    "zeros, safetensors, XLA": safetensors,
    "zeros, packed, XLA": packed,
    "zeros, jax.export": jax_export,
    BCSR: bcsr,
    "dense, onnxruntime": onnx_dense,
    "zeros, onnxruntime": onnx_pruned,
    "fewer units, XLA": compact_xla,
    "fewer units, packed, XLA": compact_packed,
    "fewer units, jax.export": compact_jax_export,
    "fewer units, onnxruntime": compact_onnx,
}
