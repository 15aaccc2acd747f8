"""The directory that a compression writes, layer by layer: Hugging Face's files, a manifest and a report.

Everything here runs on the leader alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.conversion_options import ConversionOptions
from ..checkpoint.conversion_target import check_target, resolve_target
from ..checkpoint.convert import output_files, source_fingerprint, write_config_and_tokenizer
from ..checkpoint.formats.huggingface import FORMAT
from ..checkpoint.manifest import write_manifest
from ..checkpoint.parameter_mapping import canonical_shapes
from ..checkpoint.storage.lazy_tensor import wrap_tensor
from ..checkpoint.write import create_files, write_tensors
from ..config import dtype_name
from ..errors import MissingPackageError
from ..files import PartialDirectory, recover_directory, write_text_atomically
from .decoder_layer import layer_prefix, layer_shapes
from .report import REPORT_JSON, CompressionReport, LayerReport, read_layers, write_report


class OutputDirectory:
    """A context manager around the directory under its temporary name; `publish` at the end gives it its own.

    Args:
        source: the checkpoint that is compressed.
        target: the directory to write.
        settings: recipe and calibration, for the manifest; a run is resumed only if they are the same.
        dtype: of the layers' tensors.
        options: of what is written besides.
        tokenizer: directory of tokenizer files to copy; by default the source's.
        force: replace a target that is a checkpoint already.
        resume: continue what an interrupted run has left.

    Attributes:
        layers: reports of the layers that are complete.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: Path,
        settings: dict[str, Any],
        *,
        dtype: torch.dtype,
        options: ConversionOptions,
        tokenizer: Path | None,
        force: bool,
        resume: bool,
    ) -> None:
        self.layers: list[LayerReport] = []
        self._source, self._settings, self._dtype, self._options = source, settings, dtype, options
        self._tokenizer, self._force = tokenizer, force
        target = resolve_target(target)
        recover_directory(target)
        check_target(source.path, target, force)
        fingerprint = {**source_fingerprint(source), **settings, "dtype": dtype_name(dtype)}
        self._partial = PartialDirectory(target, fingerprint, resume=resume, fsync=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._partial)
            files = output_files(self._source, self._options, self._dtype_of)
            self._files = files
            self._destinations, is_complete = create_files(self._partial.path, files)
            if not is_complete:
                self._partial.done.clear()
            self._find_finished_layers()
            self._copy_other_tensors()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write_layer(self, tensors: dict[str, Tensor], report: LayerReport) -> None:
        """Write a layer's whole tensors, by their canonical names, and note that it is complete."""
        self._write({name: wrap_tensor(tensor.to(self._dtype_of(name))) for name, tensor in tensors.items()})
        self.layers.append(report)
        write_text_atomically(self._partial.path / REPORT_JSON, self._report().to_json())
        self._partial.flush()

    def read(self, name: str) -> Tensor:
        """A whole tensor of a layer that is complete.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._written.read(name)

    def publish(self) -> CompressionReport:
        """Write config, tokenizer, manifest and report, and give the directory its name."""
        directory, report = self._partial.path, self._report()
        for name, text in FORMAT.text_files(self._source, self._files).items():
            write_text_atomically(directory / name, text)
        config = write_config_and_tokenizer(self._source, self._tokenizer, directory, self._options)
        dtypes = {name: dtype_name(self._dtype_of(name)) for name in self._source.tensors}
        write_manifest(directory, self._source, config, self._settings, dtypes, self._partial.done)
        try:
            write_report(report, directory)
        except MissingPackageError as error:
            report = replace(report, notes=(*report.notes, f"the report has no picture: {error}"))
        self._partial.publish(replace=self._force)
        return report

    @cached_property
    def _written(self) -> Checkpoint:
        return FORMAT.open(self._partial.path, self._source.config)

    def _find_finished_layers(self) -> None:
        reports = read_layers(self._partial.path) if (self._partial.path / REPORT_JSON).is_file() else ()
        for number, report in enumerate(reports):
            names = [layer_prefix(number) + name for name in layer_shapes(self._source.config, number)]
            if not all(name in self._partial.done for name in names):
                return
            self.layers.append(report)

    def _copy_other_tensors(self) -> None:
        names = [name for name in canonical_shapes(self._source.config) if ".layers." not in name]
        self._write({name: self._source.tensors[name] for name in names if name not in self._partial.done})

    def _write(self, tensors: dict[str, Any]) -> None:
        written = Checkpoint(self._source.path, self._source.format_description, self._source.config, tensors)
        write_tensors(
            written,
            {name: self._destinations[name] for name in tensors},
            workers=1,
            done={},
            on_tensor=self._partial.record,
            progress=lambda num_bytes: None,
        )

    def _dtype_of(self, name: str) -> torch.dtype:
        """In which a tensor is stored: the layers' in one dtype, the others as they were if none was asked for."""
        is_of_layer = ".layers." in name
        return self._dtype if is_of_layer or self._options.dtype is not None else self._source.tensors[name].dtype

    def _report(self) -> CompressionReport:
        settings, config = self._settings, self._source.config
        notes = ["--resume: what was there came from another source or other settings, so it began anew"]
        notes = notes if self._partial.restarted else []
        if not config.do_layer_norm_before and any("smooth" in step for step in settings["recipe"]):
            notes.append(
                "the layers normalise after their sublayers, so that q, k, v and fc1 read the residual stream itself, "
                "which cannot be smoothed: the inputs of out_proj and fc2 were"
            )
        return CompressionReport(settings["recipe"], settings["calibration"], tuple(self.layers), tuple(notes))
