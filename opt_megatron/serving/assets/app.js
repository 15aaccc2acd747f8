// The page: streams completions from /v1/completions. Text enters the document through textContent only, so no text of
// the model or the server can become markup.

const ALTERNATIVES = 5;
const MAX_SURPRISE_BITS = 10; // a token of probability 2^-10 or less gets the strongest tint
const SLIDERS = [
  "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty",
];
const FINISH_TEXTS = { stop: "came to an end", length: "all new tokens written" };

const at = (id) => document.getElementById(id);
const form = at("form"), prompt = at("prompt"), tokens = at("tokens"), alternatives = at("alternatives");

let modelName = null;
let running = null; // the AbortController of what is being generated
let generatedFrom = null; // the prompt of what is shown
let generatedText = "";
let active = null; // the token element whose alternatives are shown
const candidates = new WeakMap(); // token element -> the likeliest tokens at its place, most probable first

// --- talking to the server ---

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function connect() {
  let answer;
  try {
    answer = await fetch("v1/models", { headers: headers() });
  } catch {
    at("model").textContent = "the server cannot be reached";
    setTimeout(connect, 2000);
    return;
  }
  at("key-row").hidden = answer.status !== 401;
  if (answer.ok) {
    const model = (await answer.json()).data[0];
    modelName = model.id;
    at("model").textContent = `${model.id}, ${model.max_model_len} tokens of context`;
    at("max_tokens").max = Math.min(512, model.max_model_len - 1);
    showOptions();
  } else if (answer.status === 401) {
    at("model").textContent = at("key").value ? "this key is not the server's" : "a key is needed";
    at("key").focus();
  } else {
    at("model").textContent = await messageOf(answer);
    setTimeout(connect, 1000);
  }
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the text did");
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- generating ---

function chosenOptions() {
  const options = Object.fromEntries(SLIDERS.map((name) => [name, Number(at(name).value)]));
  options.seed = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(at("seed").value);
  if (at("stop_text").value) options.stop = at("stop_text").value;
  return options;
}

async function generate(text) {
  if (running) return;
  running = new AbortController();
  const options = chosenOptions();
  const meter = new Meter(options.seed);
  begin(text);
  let end = null;
  try {
    const answer = await fetch("v1/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({ model: modelName, prompt: text, stream: true, logprobs: ALTERNATIVES, ...options }),
    });
    if (answer.status === 401) at("key-row").hidden = false;
    if (!answer.ok) throw new Error(await messageOf(answer));
    for await (const chunk of eventsOf(answer)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      meter.count(choice.logprobs.tokens.length);
      addToken(choice);
      at("stats").textContent = meter.text();
      end = choice.finish_reason ? FINISH_TEXTS[choice.finish_reason] : end;
    }
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else showError(error.message);
  } finally {
    running = null;
    finish(meter, end);
  }
}

class Meter {
  constructor(seed) {
    this.seed = seed;
    this.begun = performance.now();
    this.first = null;
    this.tokens = 0;
  }

  count(tokens) {
    this.latest = performance.now();
    this.first ??= this.latest;
    this.tokens += tokens;
  }

  text() {
    if (!this.tokens) return "";
    const seconds = (this.latest - this.first) / 1000;
    const rate = seconds > 0 ? `, ${Math.round((this.tokens - 1) / seconds)} tokens/s` : "";
    const unit = this.tokens === 1 ? "token" : "tokens";
    return `${this.tokens} ${unit}${rate}, first after ${Math.round(this.first - this.begun)} ms, seed ${this.seed}`;
  }
}

function begin(text) {
  [generatedFrom, generatedText] = [text, ""];
  hideAlternatives();
  active = null;
  tokens.removeAttribute("aria-activedescendant");
  const echo = document.createElement("span");
  echo.className = "prompt";
  echo.setAttribute("role", "presentation");
  echo.textContent = text;
  tokens.replaceChildren(echo);
  tokens.classList.add("writing");
  tokens.hidden = false;
  at("empty").hidden = true;
  at("error").hidden = true;
  at("stats").textContent = "";
  at("status").textContent = "Generating";
  setButtons();
}

function finish(meter, end) {
  tokens.classList.remove("writing");
  if (end === null && generatedText === "") {
    [tokens.hidden, at("empty").hidden] = [true, false];
  }
  at("status").textContent = end ? `Done: ${meter.text()}; ${end}` : "";
  if (end) at("stats").textContent = [meter.text(), end].filter(Boolean).join("; ");
  setButtons();
}

function setButtons() {
  at("generate").disabled = running !== null;
  at("stop").disabled = running === null;
  // A continuation is only valid for the prompt that it was generated from.
  at("continue").disabled = running !== null || generatedText === "" || prompt.value !== generatedFrom;
}

function showError(message) {
  at("error").textContent = message;
  at("error").hidden = false;
}

// --- tokens and their alternatives ---

function addToken({ text, logprobs }) {
  if (text === "") return; // an incomplete character or stop string; its text comes with a later token
  generatedText += text;
  const last = logprobs.tokens.length - 1;
  const probability = Math.exp(logprobs.token_logprobs[last]);
  const choices = Object.entries(logprobs.top_logprobs[last])
    .map(([token, logprob]) => ({ token, probability: Math.exp(logprob), chosen: token === logprobs.tokens[last] }))
    .sort((a, b) => b.probability - a.probability);
  const span = document.createElement("span");
  span.className = "token";
  span.id = `token-${tokens.children.length}`;
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.setAttribute("aria-label", `${spoken(text)}, ${percent(probability)}`);
  span.style.setProperty("--surprise", Math.min(1, -Math.log2(probability) / MAX_SURPRISE_BITS).toFixed(3));
  span.textContent = text;
  candidates.set(span, choices);
  tokens.append(span);
}

function select(token) {
  unselect();
  active = token;
  token.setAttribute("aria-describedby", alternatives.id);
  token.setAttribute("aria-selected", "true");
  tokens.setAttribute("aria-activedescendant", token.id);
  alternatives.replaceChildren(...candidates.get(token).map(row));
  alternatives.hidden = false;
  place(token);
}

function unselect() {
  active?.setAttribute("aria-selected", "false");
  active?.removeAttribute("aria-describedby");
}

function hideAlternatives() {
  unselect();
  alternatives.hidden = true;
}

function row({ token, probability, chosen }) {
  const line = document.createElement("div");
  line.className = chosen ? "alternative chosen" : "alternative";
  const name = document.createElement("code");
  name.textContent = visible(token);
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.setProperty("--p", probability.toFixed(4));
  const number = document.createElement("span");
  number.className = "percent";
  number.textContent = percent(probability);
  line.append(name, bar, number);
  return line;
}

function place(token) {
  const paper = alternatives.parentElement.getBoundingClientRect();
  const lines = token.getClientRects();
  const box = lines[lines.length - 1];
  const left = Math.min(box.left - paper.left, paper.width - alternatives.offsetWidth - 8);
  const below = box.bottom - paper.top + 6;
  const fitsBelow = box.bottom + alternatives.offsetHeight + 12 < window.innerHeight;
  const above = box.top - paper.top - alternatives.offsetHeight - 6;
  alternatives.style.left = `${Math.max(8, left)}px`;
  alternatives.style.top = `${fitsBelow ? below : above}px`;
}

function percent(probability) {
  return probability < 0.0995 ? `${(100 * probability).toFixed(1)}%` : `${Math.round(100 * probability)}%`;
}

function visible(token) {
  return token === "</s>" ? "end of text" : token.replaceAll("\n", "⏎").replace(/^ | $/g, "·");
}

function spoken(text) {
  return text === "\n" ? "new line" : text.trim() || "space";
}

function move(event) {
  const all = [...tokens.querySelectorAll(".token")];
  if (!all.length) return;
  const here = all.indexOf(active);
  const next = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const target = all[Math.max(0, Math.min(all.length - 1, next))];
  target.scrollIntoView({ block: "nearest" });
  select(target);
}

// --- controls ---

function showOptions() {
  for (const output of document.querySelectorAll(".slider output")) output.textContent = at(output.htmlFor.value).value;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate(prompt.value);
});
form.addEventListener("reset", (event) => {
  const [text, key] = [prompt.value, at("key").value];
  setTimeout(() => {
    [prompt.value, at("key").value] = [text, key];
    showOptions();
    setButtons();
  });
});
form.addEventListener("input", () => {
  showOptions();
  setButtons();
});
at("stop").addEventListener("click", () => running?.abort());
at("continue").addEventListener("click", () => {
  prompt.value += generatedText;
  generate(prompt.value);
});
at("key-use").addEventListener("click", connect);
at("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // Enter would submit the form
  connect();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    setButtons();
    prompt.focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Escape") {
    if (running) running.abort();
    else hideAlternatives();
  }
});
tokens.addEventListener("keydown", move);
tokens.addEventListener("focus", () => {
  const first = tokens.querySelector(".token");
  if (tokens.matches(":focus-visible") && first) select(active?.isConnected ? active : first);
});
tokens.addEventListener("blur", hideAlternatives);
for (const kind of ["pointerover", "click"]) {
  tokens.addEventListener(kind, (event) => event.target.matches(".token") && select(event.target));
}
tokens.addEventListener("pointerleave", () => document.activeElement === tokens || hideAlternatives());

showOptions();
setButtons();
connect();
