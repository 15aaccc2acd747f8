"""The directory that a compression writes, layer by layer: Hugging Face's files, a manifest and a report.

Everything here runs on the leader alone.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.conversion_options import ConversionOptions
from ..checkpoint.conversion_target import check_target, resolve_target
from ..checkpoint.convert import source_fingerprint, write_config_and_tokenizer
from ..checkpoint.formats import huggingface
from ..checkpoint.formats.gptq import QUANTIZE_CONFIG
from ..checkpoint.manifest import write_manifest
from ..checkpoint.parameter_mapping import canonical_shapes
from ..checkpoint.storage.lazy_tensor import wrap_tensor
from ..checkpoint.write import create_files, tensor_hash, write_tensors
from ..config import dtype_name
from ..errors import MissingPackageError
from ..files import PartialDirectory, read_text, recover_directory, write_text_atomically
from .report import REPORT_JSON, CompressionReport, LayerReport, read_layers, write_report
from .stored_layout import StoredLayout


class OutputDirectory:
    """A context manager around the directory under its temporary name; `publish` at the end gives it its own.

    Args:
        source: the checkpoint that is compressed.
        target: the directory to write.
        settings: recipe and calibration, for the manifest; a run is resumed only if they are the same.
        layout: in which form the layers are stored.
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
        layout: StoredLayout,
        *,
        options: ConversionOptions,
        tokenizer: Path | None,
        force: bool,
        resume: bool,
    ) -> None:
        self.layers: list[LayerReport] = []
        self._source, self._settings, self._layout, self._options = source, settings, layout, options
        self._tokenizer, self._force = tokenizer, force
        target = resolve_target(target)
        recover_directory(target)
        check_target(source.path, target, force)
        fingerprint = {
            **source_fingerprint(source),
            **settings,
            "dtype": dtype_name(layout.dtype),
            "layout": layout.format.title,
        }
        self._partial = PartialDirectory(target, fingerprint, resume=resume, fsync=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._partial)
            files = self._layout.output_files()
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

    def write_layer(self, sent: dict[str, Tensor], report: LayerReport) -> None:
        """Write the next layer, from the whole tensors that `StoredLayout.sent` names, and note that it is complete."""
        stored = self._layout.stored(len(self.layers), sent)
        self._write({name: wrap_tensor(tensor) for name, tensor in stored.items()})
        self.layers.append(report)
        write_text_atomically(self._partial.path / REPORT_JSON, self._report().to_json())
        self._partial.flush()

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor of a layer that is complete.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._written.read(name)

    def publish(self) -> CompressionReport:
        """Write config, tokenizer, manifest and report, and give the directory its name."""
        directory, report = self._partial.path, self._report()
        for name, text in huggingface.FORMAT.text_files(self._source, self._files).items():
            write_text_atomically(directory / name, text)
        config = write_config_and_tokenizer(self._source, self._tokenizer, directory, self._options)
        self._write_settings(directory)
        written = self._written
        dtypes = {name: dtype_name(tensor.dtype) for name, tensor in written.tensors.items()}
        hashes = {name: self._partial.done.get(name) or tensor_hash(written, name) for name in written.tensors}
        write_manifest(directory, self._source, config, self._settings, dtypes, hashes)
        try:
            write_report(report, directory)
        except MissingPackageError as error:
            report = replace(report, notes=(*report.notes, f"the report has no picture: {error}"))
        self._partial.publish(replace=self._force)
        return report

    @cached_property
    def _written(self) -> Checkpoint:
        self._write_settings(self._partial.path)
        return self._layout.format.open(self._partial.path, self._source.config)

    def _write_settings(self, directory: Path) -> None:
        """Write what readers of integers look for, beside the weights and in config.json, if that is there."""
        settings, config = self._layout.settings(), directory / "config.json"
        if settings is None:
            return
        write_text_atomically(directory / QUANTIZE_CONFIG, json.dumps(settings, indent=2) + "\n")
        if config.is_file():
            content = json.loads(read_text(config)) | {"quantization_config": settings}
            write_text_atomically(config, json.dumps(content, indent=2) + "\n")

    def _find_finished_layers(self) -> None:
        reports = read_layers(self._partial.path) if (self._partial.path / REPORT_JSON).is_file() else ()
        for number, report in enumerate(reports):
            names = self._layout.stored_names(number)
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
