// SPDX-License-Identifier: Apache-2.0
// The page at /: talks to the same API as every other client, and draws /status twice a second.

const CELLS = 256; // of the picture of the pool
const PERIOD_MS = 500;
const HISTORY = 120; // points of a minute
const MOST_CHIPS = 60;
const MODELS_EVERY = 20; // refreshes: adapters come and go

const at = (id) => document.getElementById(id);
const history = [];
let base = "";
let known = []; // names of models
let refreshes = 0;
let running = null; // the AbortController of the answer that is being streamed

const headers = () => {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

async function ask(path) {
  const response = await fetch(path, { headers: headers() });
  if (response.status === 401) at("key-row").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.json();
}

// Models

function choose(name) {
  at("model").value = name;
  for (const chip of at("chips").children)
    chip.setAttribute("aria-pressed", String(chip.dataset.name === name));
}

async function loadModels() {
  const { data } = await ask("/v1/models");
  const names = data.map((card) => card.id);
  if (names.join() === known.join()) return;
  known = names;
  at("models").replaceChildren(...names.map((name) => new Option(name)));
  at("chips").replaceChildren(
    ...names.slice(0, MOST_CHIPS).map((name) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = name;
      chip.dataset.name = name;
      chip.addEventListener("click", () => choose(name));
      return chip;
    }),
  );
  choose(at("model").value || names[1] || names[0]);
}

// An answer

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const chat = at("chat").checked;
  const prompt = at("prompt").value;
  const body = {
    model: at("model").value,
    max_tokens: at("max-tokens").valueAsNumber || 64,
    temperature: at("temperature").valueAsNumber || 0,
    stream: true,
    stream_options: { include_usage: true },
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  return [chat ? "/v1/chat/completions" : "/v1/completions", body];
}

async function send() {
  running?.abort();
  const mine = (running = new AbortController());
  const answer = at("answer");
  answer.textContent = "";
  answer.classList.remove("error");
  at("measured").textContent = "waiting for the first token …";
  at("stop").disabled = false;
  const [path, body] = request();
  const start = performance.now();
  let first = null;
  let usage = null;
  try {
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.signal,
    });
    if (response.status === 401) at("key-row").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      const text = choice?.text ?? choice?.delta?.content ?? "";
      if (text && first === null) first = performance.now();
      answer.append(text);
      answer.scrollTop = answer.scrollHeight;
    }
    if (!usage) throw new Error(" — the connection broke off");
    const took = (performance.now() - start) / 1000;
    const wait = first === null ? "" : `first token after ${Math.round(first - start)} ms, `;
    at("measured").textContent = `${wait}${usage.completion_tokens} tokens in ${took.toFixed(2)} s`;
  } catch (error) {
    if (error.name === "AbortError") {
      at("measured").textContent = "stopped";
    } else {
      answer.classList.add("error");
      answer.append(error.message);
      at("measured").textContent = "";
    }
  } finally {
    if (running === mine) {
      running = null;
      at("stop").disabled = true;
    }
  }
}

// The picture

function color(name) {
  let hash = 0;
  for (const letter of name) hash = (hash * 31 + letter.codePointAt(0)) % 360;
  return `hsl(${(hash * 137) % 360} 55% 50%)`;
}

function parts(status) {
  const { pool, residents } = status;
  const found = [{ name: "KV cache", pages: pool.kv, kind: "kv" }];
  for (const one of residents) {
    const name = one.names.join(", ");
    const idle = !one.users && !one.pinned;
    const notes = [`rank ${one.rank}`, one.pinned && "pinned", idle && "cached"].filter(Boolean);
    found.push({ name, pages: one.pages, color: color(name), idle, note: notes.join(", ") });
  }
  found.push({ name: "free", pages: pool.free });
  return found;
}

function paint(element, part) {
  element.className = [part.kind, part.idle && "cached"].filter(Boolean).join(" ");
  element.style.background = part.color ?? "";
  element.title = part.name;
}

function drawPool(status) {
  const pool = at("pool");
  while (pool.children.length < CELLS) pool.append(document.createElement("i"));
  const all = parts(status);
  let cell = 0;
  let seen = 0;
  for (const part of all) {
    seen += part.pages;
    // What is there is seen, however small.
    const least = part.pages && part.name !== "free" ? cell + 1 : cell;
    const end = Math.max(Math.round((CELLS * seen) / status.pool.pages), least);
    for (; cell < Math.min(end, CELLS); cell++) paint(pool.children[cell], part);
  }
  const said = all.filter((part) => part.pages || part.name === "KV cache");
  pool.ariaLabel = `The page pool of ${status.pool.pages} pages: ` +
    said.map((part) => `${part.name} ${part.pages}`).join(", ");
  at("legend").replaceChildren(
    ...said.map((part) => {
      const item = document.createElement("li");
      const square = document.createElement("i");
      paint(square, part);
      item.append(square, `${part.name} ${part.pages}${part.note ? ` (${part.note})` : ""}`);
      return item;
    }),
  );
}

function drawFigures(status) {
  at("running").textContent = status.running;
  at("waiting").textContent = status.waiting;
  at("rate").textContent = Math.round(status.tokens_per_second);
  const first = status.first_token_s;
  at("first-token").textContent = first === null ? "–" : `${Math.round(1000 * first)} ms`;
  at("adapters").textContent = `${status.residents.length} of ${status.max_lora ?? "–"}`;
  at("hits").textContent = `${status.hits} / ${status.misses}`;
  history.push(status.tokens_per_second);
  if (history.length > HISTORY) history.shift();
  const most = Math.max(...history, 1);
  const point = (rate, i) => `${(300 * i) / (HISTORY - 1)},${58 - (54 * rate) / most}`;
  at("line").setAttribute("points", history.map(point).join(" "));
}

async function refresh() {
  const state = at("state");
  try {
    const status = await ask("/status");
    const bad = status.state !== "ready" || status.draining;
    const word = status.draining ? "shutting down" : status.state;
    state.textContent = `${status.model} on ${status.device ?? "…"}: ${word}` +
      (status.failure && bad ? ` (${status.failure})` : "");
    state.classList.toggle("bad", bad);
    if (base !== status.model || refreshes++ % MODELS_EVERY === 0) {
      base = status.model;
      await loadModels();
    }
    if (status.pool) drawPool(status);
    drawFigures(status);
  } catch (error) {
    base = "";
    state.textContent = error instanceof TypeError ? "the server is not there" : error.message;
    state.classList.add("bad");
  }
  setTimeout(refresh, document.hidden ? 4 * PERIOD_MS : PERIOD_MS);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => running?.abort());
at("model").addEventListener("input", () => choose(at("model").value));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
refresh();
