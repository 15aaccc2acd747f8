"""opt-megatron generate as a user calls it: output, input, mistakes, several ranks, a rank that dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factory import oracle_greedy
from safetensors.torch import load_file, save_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main
from opt_megatron.tokenizer import OPTTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"
TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["generate", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_json_has_the_continuation_alone_and_the_oracles_tokens(models, capsys):
    _, oracle = models["story"]
    arguments = ("--prompt", "Once upon a time", "--prompt", "The king", "--temperature", "0", "--ignore-eos")
    code, out, err = run(capsys, *arguments, "--json", "--max-new-tokens", "30")
    assert code == 0 and "no --load" in err and "toy" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["Once upon a time", "The king"]
    for line in lines:
        assert tuple(line["tokens"]) == oracle_greedy(oracle, TOKENIZER.encode(line["prompt"]), 30)
        assert line["text"] == TOKENIZER.decode(line["tokens"])
        assert line["finish_reason"] == "length"


def test_text_output_is_prompt_and_continuation_streamed_or_not(capsys):
    arguments = ("--prompt", "Once", "--prompt", "The king", "--temperature", "0", "--max-new-tokens", "9")
    _, plain, _ = run(capsys, *arguments)
    _, streamed, _ = run(capsys, *arguments, "--stream")
    assert plain == streamed
    assert plain.startswith("=== prompt 1 of 2 ===\nOnce") and "\n\n=== prompt 2 of 2 ===\nThe king" in plain
    _, alone, _ = run(capsys, *arguments[2:])
    assert plain.endswith("===\n" + alone) and alone.startswith("The king")


def test_token_ids_need_no_tokenizer_and_get_no_bos(models, capsys):
    directory, oracle = models["pre-norm"]  # it has no tokenizer files
    base = ("--load", str(directory), "--temperature", "0", "--ignore-eos", "--max-new-tokens", "8")
    code, out, _ = run(capsys, *base, "--prompt-tokens", "2 15 7", "--prompt-tokens", "40,41", "--json")
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and first["prompt"] == [2, 15, 7] and first["text"] == ""
    assert tuple(first["tokens"]) == oracle_greedy(oracle, [2, 15, 7], 8)
    assert tuple(second["tokens"]) == oracle_greedy(oracle, [40, 41], 8)
    _, out, _ = run(capsys, *base, "--prompt-tokens", "40,41")
    assert out == "40 41 " + " ".join(map(str, second["tokens"])) + "\n"
    code, _, err = run(capsys, *base, "--prompt", "text")
    assert code == 2 and "there is no tokenizer" in err


@pytest.mark.parametrize(
    "content", ["Once\n\nThe king\n", '{"prompt": "Once"}\n{"prompt": "The king", "id": 3}\n', "\ufeffOnce\r\nThe king"]
)
def test_prompt_files_in_lines_and_json_lines(capsys, tmp_path, content):
    path = tmp_path / "prompts"
    path.write_bytes(content.encode("utf-8"))
    _, out, _ = run(capsys, "--prompt-file", str(path), "--json", "--max-new-tokens", "2")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Once", "The king"]


def test_stop_string_and_seed(capsys):
    base = ("--prompt", "Once upon a time", "--json", "--max-new-tokens", "40", "--seed", "5", "--top-k", "50")
    _, first, _ = run(capsys, *base)
    _, second, _ = run(capsys, *base)
    assert first == second
    text = json.loads(first)["text"]
    _, stopped, _ = run(capsys, *base, "--stop", text[15:22])
    assert json.loads(stopped)["text"] == text[:15]
    assert json.loads(stopped)["finish_reason"] == "stop"
    assert run(capsys, *base[:-3], "6", "--top-k", "50")[1] != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "/nowhere", "--prompt", "x"], "there is no such directory"),
        (["--prompt", "x", "--dtype", "float17"], "'float17' is not one of"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "word " * 3000], "has 3001 tokens|has 300. tokens"),
        (["--prompt", "x", "--max-new-tokens", "600"], "would pass the model's 512 positions: ask for 510"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2"),
        (["--prompt", "x", "--top-k", "many"], "invalid int value"),
        (["--prompt", "x", "--tensor-model-parallel-size", "3"], "torchrun --nproc-per-node 3"),
        (["--prompt", "x", "--max-batch-size", "0"], "max-batch-size is 0"),
        (["--prompt", "x", "--prompt-tokens", "2"], "use one of them"),
        (["--prompt-tokens", "2 4096"], "holds the id 4096"),
        (["--prompt-tokens", "two"], "not a list of whole numbers"),
        (["--prompt-file", "/nowhere"], "No such file"),
        (["--load", "", "--prompt", "x"], "is a shell variable unset"),
        (["--prompt-file", ""], "is a directory|No such file"),
        (["--prompt", "\udcff"], "prompt 1 is not UTF-8"),
        ([], "there is no prompt|holds no prompt|cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.stdin", None)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("opt-megatron: error: ")
    assert re.search(message, err)


def test_bad_lines_of_a_prompt_file_are_named(capsys, tmp_path):
    (tmp_path / "p").write_bytes(b'{"prompt": "a"}\nplain\n')
    assert "line 2 is not a JSON object" in run(capsys, "--prompt-file", str(tmp_path / "p"))[2]
    (tmp_path / "p").write_bytes(b"a\xff")
    assert "is not UTF-8 (byte 1" in run(capsys, "--prompt-file", str(tmp_path / "p"))[2]


def test_extreme_options_still_choose_a_token(capsys):
    for options in (["--temperature", "1e-40"], ["--repetition-penalty", "1e-40"], ["--repetition-penalty", "1e30"]):
        code, out, _ = run(capsys, "--prompt", "Once", "--json", "--ignore-eos", "--max-new-tokens", "3", *options)
        assert code == 0 and len(json.loads(out)["tokens"]) == 3


def test_rows_that_the_tokenizer_does_not_know_are_never_sampled(capsys, tmp_path):
    """A vocabulary padded to a round number, as many fine-tuned models have it."""
    shutil.copytree(EMBEDDED_DIRECTORY, tmp_path / "padded")
    path = tmp_path / "padded" / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][-1:].expand(104, -1) * 4])
    save_file(tensors, path)
    config = tmp_path / "padded" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 4096', '"vocab_size": 4200'))
    options = ["--load", str(tmp_path / "padded"), "--json", "--ignore-eos", "--max-new-tokens", "80"]
    code, out, _ = run(capsys, "--prompt", "Once", *options, "--temperature", "3")
    assert code == 0 and max(json.loads(out)["tokens"]) < 4096


def test_streamed_token_prompts_show_text_and_lose_none_of_it(capsys):
    options = ["--prompt-tokens", "2 100 200", "--temperature", "0", "--max-new-tokens", "12", "--stop", ".\n\nX"]
    _, out, _ = run(capsys, *options, "--json")
    text = json.loads(out)["text"]
    _, streamed, _ = run(capsys, *options, "--stream")
    assert streamed == "2 100 200" + text + "\n"


def torchrun(world_size: int, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run(
        [*command, str(TOOL), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options
    )


def test_torchrun_tool_and_standard_input_give_one_process_output(capsys, tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "tp4", ConversionOptions(tensor_model_parallel_size=4))
    options = ("--load", str(tmp_path / "tp4"), "--json", "--temperature", "0", "--max-new-tokens", "12")
    done = torchrun(2, *options, "--tensor-model-parallel-size", "2", input="Once upon a time\nThe king\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    _, alone, _ = run(capsys, *options, "--prompt", "Once upon a time", "--prompt", "The king")
    assert done.stdout == alone


def test_a_mistake_on_several_ranks_is_told_once_and_ends_them_all():
    done = torchrun(3, "--prompt", "x", "--pipeline-model-parallel-size", "3")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("opt-megatron: error:") == 1
    assert "3 does not divide the model's 4 layers: use one of 1, 2, 4" in done.stderr


@pytest.mark.parametrize(
    ("victim", "sizes", "how", "message"),
    [
        (1, (2, 1), signal.SIGSTOP, "rank 1 has given no sign of life for 4 s (--step-timeout)"),
        (0, (1, 2), signal.SIGKILL, "lost the connection to another rank"),
    ],
)
def test_when_a_rank_is_stopped_or_killed_the_other_ends(victim, sizes, how, message):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tp, pp = map(str, sizes)
    options = ["--prompt", "Once", "--max-new-tokens", "500", "--ignore-eos", "--stream", "--step-timeout", "4"]
    options += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    processes = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(TOOL), *options],
                env=ENVIRONMENT | world,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    assert processes[0].stdout.read(20).startswith("Once")  # generation is under way
    processes[victim].send_signal(how)
    _, errors = processes[1 - victim].communicate(timeout=60)
    processes[victim].kill()
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 1
    assert message in errors and "Traceback" not in errors


def test_several_continuations_scores_and_echo_in_json(capsys):
    arguments = ("--prompt", "Once upon a time", "--max-new-tokens", "4", "--n", "2", "--logprobs", "1", "--echo")
    code, out, _ = run(capsys, *arguments, "--json")
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and (first["choice"], second["choice"]) == (0, 1) and first["tokens"] != second["tokens"]
    assert len(first["logprobs"]) == len(first["top_logprobs"]) == 4
    assert first["prompt_tokens"] == TOKENIZER.encode("Once upon a time") and "prompt_tokens" not in second
    assert first["prompt_logprobs"][0] is None and all(score < 0 for score in first["prompt_logprobs"][1:])
    _, out, _ = run(capsys, *arguments)
    assert out.startswith("=== continuation 1 of 2 ===\nOnce upon a time") and "=== continuation 2 of 2 ===" in out
    tokens = [*first["prompt_tokens"], *first["tokens"]]  # a line each, with the likeliest beside it
    scores = first["prompt_logprobs"] + first["logprobs"]
    lines = out.split("\n\n===")[0].splitlines()[-len(tokens) :]
    for token, score, line in zip(tokens[1:], scores[1:], lines[1:], strict=True):
        assert line.startswith(f"{score:8.3f}  {TOKENIZER.decode([token])!r}   ")
    scored = ("--prompt", "Once", "--max-new-tokens", "0", "--echo", "--logprobs", "0", "--json")
    code, out, _ = run(capsys, *scored)
    assert code == 0 and json.loads(out)["tokens"] == [] and len(json.loads(out)["prompt_logprobs"]) == 2
    _, out, _ = run(capsys, "--prompt", "Once", "--max-new-tokens", "1", "--prompt-logprobs", "0")
    assert out.splitlines()[-1] == f"{json.loads(run(capsys, *scored)[1])['prompt_logprobs'][1]:8.3f}  'Once'"


def test_a_prompt_may_have_its_own_options(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Once upon a time", "options": {"temperature": 0, "max_new_tokens": 3}},
        {"prompt": "Once upon a time", "options": {"temperature": 0, "stop": " there", "max_new_tokens": 30}},
        {"prompt": "Once upon a time"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    _, out, _ = run(capsys, "--prompt-file", str(path), "--json", "--max-new-tokens", "5")
    results = [json.loads(line) for line in out.splitlines()]
    assert [len(result["tokens"]) for result in results] == [3, 1, 5]
    assert [result["finish_reason"] for result in results] == ["length", "stop", "length"]


def test_defaults_of_the_model_are_for_what_is_not_given(capsys, tmp_path):
    directory = shutil.copytree(EMBEDDED_DIRECTORY, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 3}')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king", "options": {"max_new_tokens": 2}}\n')
    ask, greedy = ("--load", str(directory), "--prompt", "The king"), ("--temperature", "0", "--max-new-tokens", "3")
    code, out, err = run(capsys, *ask)
    assert code == 0 and "generation_config.json: where nothing else is given max_new_tokens 3, temperature 0 (" in err
    assert out == run(capsys, "--prompt", "The king", *greedy)[1]
    assert run(capsys, *ask, "--temperature", "3")[1] != out
    own = run(capsys, "--load", str(directory), "--prompt-file", str(tmp_path / "prompts.jsonl"))[1]
    assert out.startswith(own.rstrip("\n")) and own != out
    code, without, err = run(capsys, *ask, "--no-generation-config")
    assert len(without) > 2 * len(out) and "generation_config" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "prompt 1: there is no option 'temprature'"),
        ({"temperature": "hot"}, "temperature is 'hot', but must be a number"),
        ({"top_k": True}, "top_k is True"),
        ({"stop": [1]}, "stop is"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {"9999": 1}}, "logit_bias has 9999, but ids go from 0 to 4095"),
        ({"stop_regex": "("}, "stop_regex"),
        ([], "'options' is not an object"),
    ],
)
def test_wrong_options_of_a_prompt_are_one_line(capsys, tmp_path, options, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Once", "options": options}))
    code, out, err = run(capsys, "--prompt-file", str(path))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-beams", "3", "--top-k", "3"), "has no meaning in a beam search"),
        (("--num-beams", "30"), "needs 30 rows at a time; raise max_batch_size, which is 16"),
        (
            ("--kv-cache-memory", "1kB"),
            "kv_cache_memory is 1000 bytes, but 64 tokens, the minimum, take 524288",
        ),
        (("--kv-cache-memory", "1MB", "--max-new-tokens", "300"), "tokens of KV cache and 64 fit"),
        (("--prefill-chunk-size", "0"), "--prefill-chunk-size is 0"),
        (("--draft-model", "story", "--prompt-lookup"), "use one of them"),
        (("--logit-bias", "5:3"), "is not an id and a number"),
        (("--n", "3", "--best-of", "2"), "best_of is 2, but must be at least n, which is 3"),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, "--prompt", "Once", *arguments)
    assert code == 2 and out == "" and message in err
    assert err.splitlines()[-1].startswith("opt-megatron: error: ")


def test_searches_quantisation_and_speculation_run_from_the_command_line(capsys):
    base = ("--prompt", "Once upon a time", "--max-new-tokens", "12", "--json")
    greedy = (*base, "--temperature", "0")
    plain = run(capsys, *greedy)[1]
    assert run(capsys, *greedy, "--prompt-lookup")[1] == plain
    assert run(capsys, *greedy, "--draft-model", "story", "--num-speculative-tokens", "3")[1] == plain
    beams = [json.loads(line) for line in run(capsys, *base, "--num-beams", "3", "--n", "3")[1].splitlines()]
    assert [line["choice"] for line in beams] == [0, 1, 2] and len({tuple(line["tokens"]) for line in beams}) == 3
    for extra in (("--quantization", "int8"), ("--penalty-alpha", "0.6", "--top-k", "4")):
        code, out, _ = run(capsys, *(base if "--top-k" in extra else greedy), *extra)
        assert code == 0 and len(json.loads(out)["tokens"]) == 12
