"""opt-megatron generate --interactive: a text that grows turn by turn, typed and generated."""

from __future__ import annotations

import contextlib
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError, print_notice
from ..generation.core.request_queue import RequestQueue
from ..generation.request import TokenEvent
from ..generation.sampling.sampling_params import SamplingParams
from ..options import options_of
from .sampling import sampling_params

if TYPE_CHECKING:
    from ..api import OPT
    from ..generation.generation_config import GenerationConfig

HELP = """\
What you type is added to the text as it is, and the text is continued; an empty line continues it again.
Begin with a space to begin a new word; \\n is a line break.
  /undo              take the last turn back
  /text              show the whole text
  /new               begin a new text
  /set NAME VALUE    change an option from now on, for example /set temperature 0.7
  /options           show the options that are not at their defaults
  /help              show this
  /quit              end (so does the end of the input)
Ctrl-C ends a continuation early."""


class _ContinuousEngine:
    """The engine in a thread of its own, which keeps the other ranks waiting for the next turn as long as it takes."""

    def __init__(self, opt: OPT) -> None:
        self._engine = opt.engine
        self._requests = RequestQueue()
        self._events: SimpleQueue[TokenEvent | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for event in self._engine.generate(self._requests):
                self._events.put(event)
        except BaseException as error:
            self._events.put(error)

    def close(self) -> None:
        """End it, on all ranks."""
        self._requests.close()
        self._thread.join()

    def print_continuation(self, opt: OPT, text: str, params: SamplingParams) -> str:
        """Print the continuation of a text as it is generated, up to Ctrl-C, and return it.

        Raises:
            UserError: the text cannot be continued.
        """
        number = self._requests.put(opt.request(text, params))
        pieces: list[str] = []
        while True:
            try:
                event = self._events.get()
            except KeyboardInterrupt:
                self._requests.cancel(number)
                continue
            if isinstance(event, BaseException):
                raise event
            if event.finish_reason in ("refused", "failed"):
                raise UserError(event.text)
            pieces.append(event.text)
            print(event.text, end="\n" if event.finish_reason else "", flush=True)
            if event.finish_reason:
                return "".join(pieces)


class Interaction:
    """The text, what it was before each turn, and the options.

    Args:
        given: the options of the command.
        config: the model's, for what is not given.

    Attributes:
        text: typed and generated so far.
        params: of the next turn.

    Raises:
        UserError: the options ask for several continuations.
    """

    def __init__(self, given: dict[str, Any], config: GenerationConfig) -> None:
        self.text = ""
        self._given, self._config = given, config
        self.params = _checked(SamplingParams(**config.with_defaults(given)))
        self._earlier: list[str] = []

    def begin_turn(self, typed: str) -> None:
        """Add what was typed to the text.

        Raises:
            UserError: the text is empty then.
        """
        text = self.text + typed.replace("\\n", "\n")
        if not text:
            raise UserError("there is no text yet: type how it begins (/help shows the commands)")
        self._earlier.append(self.text)
        self.text = text

    def undo(self) -> None:
        """Take the last turn back.

        Raises:
            UserError: there is none.
        """
        if not self._earlier:
            raise UserError("there is nothing to undo")
        self.text = self._earlier.pop()

    def run_command(self, line: str) -> str:
        """Run a command other than /quit, and return what it shows.

        Raises:
            UserError: there is no such command, or its argument is wrong.
        """
        command, _, argument = line[1:].partition(" ")
        if command == "undo":
            self.undo()
            return self.text
        if command == "text":
            return self.text
        if command == "new":
            self.text, self._earlier = "", []
            return ""
        if command == "set":
            self._set(argument)
            return ""
        if command == "options":
            return self._options()
        if command == "help":
            return HELP
        raise UserError(f"there is no command /{command}; /help shows them")

    def _set(self, argument: str) -> None:
        name, _, value = argument.strip().partition(" ")
        if not value:
            raise UserError("write /set NAME VALUE, for example /set temperature 0.7")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        changed = {name.replace("-", "_"): parsed}
        self.params = _checked(sampling_params(self._given, changed, self._config, "/set"))
        self._given = self._given | changed

    def _options(self) -> str:
        values = {name: (getattr(self.params, name), item.default) for name, item in options_of(SamplingParams).items()}
        return "\n".join(f"{name} {value}" for name, (value, default) in values.items() if value != default)


def _checked(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise UserError(f"n is {params.n}, but a text has one continuation with --interactive")
    return params


def run_interactive(opt: OPT, given: dict[str, Any]) -> None:
    """Read turns from standard input and continue the text, until the end of the input; called on every rank.

    Args:
        given: the sampling options of the command.

    Raises:
        UserError: the options ask for several continuations.
    """
    interaction = Interaction(given, opt.pretrained.generation_config)
    if not opt.parallel.is_leader:
        for _ in opt.engine.generate([]):  # the leader's steps
            pass
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has editing and a history)
    engine = _ContinuousEngine(opt)
    try:
        _read_turns(opt, engine, interaction)
    finally:
        engine.close()


def _read_turns(opt: OPT, engine: _ContinuousEngine, interaction: Interaction) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                shown = interaction.run_command(line)
                print(shown, end="\n" if shown else "", flush=True)
            else:
                interaction.begin_turn(line)
                _continue_text(opt, engine, interaction)
        except UserError as error:
            print_notice(str(error))


def _continue_text(opt: OPT, engine: _ContinuousEngine, interaction: Interaction) -> None:
    try:
        interaction.text += engine.print_continuation(opt, interaction.text, interaction.params)
    except UserError:
        interaction.undo()
        raise
