// The page at /: asks the endpoint as any client would, and shows what comes and how fast.
const at = (id) => document.getElementById(id);
const LOOK_MS = 2000;
const LABELS = { chat: "Your message", completion: "Text to go on from", classification: "Text to name the class of", transcription: "Audio file to write down", images: "What to make images of" };
const FIELDS = { writes: ["chat", "completion"], draws: ["images"], keeps: ["chat", "completion", "classification"] };
let models = [];
let talk = []; // of the chat
let asking = null; // what the Stop button ends

function headers(form) {
  const key = at("key").value.trim();
  return { ...(!form && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(path, body, signal) {
  const form = body instanceof FormData;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers: headers(form), body: form ? body : body && JSON.stringify(body), signal });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

const mode = () => document.querySelector('input[name="mode"]:checked').value;

function showModes() {
  const task = models.find((it) => it.id === at("model").value)?.task;
  const fit = task === "completion" ? ["chat", "completion"] : [task];
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.disabled = !fit.includes(input.value);
    if (input.disabled && input.checked) input.checked = false;
  }
  if (!document.querySelector('input[name="mode"]:checked')) {
    const first = document.querySelector('input[name="mode"]:not(:disabled)');
    if (first) first.checked = true;
  }
  const now = document.querySelector('input[name="mode"]:checked')?.value;
  at("send").disabled = !now;
  at("text-label").textContent = LABELS[now] ?? "This model cannot be tried here";
  for (const label of document.querySelectorAll("label[class]")) {
    label.hidden = ![...label.classList].some((it) => FIELDS[it]?.includes(now));
  }
  const hears = now === "transcription";
  at("text").hidden = hears;
  at("text").required = !hears;
  at("file").hidden = !hears;
  at("file").required = hears;
}

async function look() {
  if (document.hidden) return;
  try {
    if (!models.length) {
      models = (await (await ask("v1/models")).json()).data;
      at("model").replaceChildren(...models.map((it) => new Option(`${it.id} (${it.task})`, it.id)));
      showModes();
    }
    const replicas = (await (await ask("v1/replicas")).json()).data;
    at("replicas").replaceChildren(...replicas.map(replicaRow));
    at("state").textContent = `${models.length} model${models.length > 1 ? "s" : ""}, ${replicas.length} replica${replicas.length === 1 ? "" : "s"}`;
  } catch (error) {
    at("state").textContent = error.message;
  }
}

function replicaRow(it) {
  const row = document.createElement("tr");
  for (const text of [it.model, it.version, it.replica]) row.insertCell().textContent = text;
  for (const count of [it.running, it.waiting]) {
    const cell = row.insertCell();
    cell.className = "number";
    cell.textContent = count ?? "";
  }
  const cell = row.insertCell();
  if (it.cache_tokens) {
    const meter = document.createElement("meter");
    Object.assign(meter, { max: it.cache_tokens, value: it.cached_tokens, title: `${it.cached_tokens} of ${it.cache_tokens} tokens` });
    cell.append(meter);
  }
  return row;
}

function newAnswer(asked) {
  const article = at("answer").content.firstElementChild.cloneNode(true);
  article.querySelector(".asked").textContent = asked;
  at("answers").prepend(article);
  return article;
}

function rateable(article, request) {
  article.dataset.request = request;
  for (const [name, other] of [["up", "down"], ["down", "up"]]) {
    const button = article.querySelector(`.${name}`);
    button.disabled = false;
    button.onclick = async () => {
      try {
        await ask("v1/feedback", { request, rating: name });
        button.setAttribute("aria-pressed", "true");
        article.querySelector(`.${other}`).setAttribute("aria-pressed", "false");
      } catch (error) {
        article.querySelector(".times").textContent = error.message;
      }
    };
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const parts = pending.split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function write(article, signal) {
  const chat = mode() === "chat";
  const text = at("text").value;
  const began = performance.now();
  const body = {
    model: at("model").value, max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value),
    stream: true, stream_options: { include_usage: true }, store: at("store").checked,
    ...(at("seed").value && { seed: Number(at("seed").value) }),
    ...(chat ? { messages: [...talk, { role: "user", content: text }] } : { prompt: text }),
  };
  const response = await ask(chat ? "v1/chat/completions" : "v1/completions", body, signal);
  const said = article.querySelector(".said");
  let first = 0;
  let usage = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    if (!article.dataset.request && event.id) rateable(article, event.id);
    const choice = event.choices[0];
    if (!choice) continue;
    first ||= performance.now() - began;
    said.textContent += (chat ? choice.delta.content : choice.text) ?? "";
  }
  const all = performance.now() - began;
  const tokens = usage?.completion_tokens ?? 0;
  const rate = tokens > 1 && all > first ? `, ${Math.round((1000 * (tokens - 1)) / (all - first))} tokens/s` : "";
  article.querySelector(".times").textContent = `first token ${Math.round(first)} ms${rate}, ${tokens} tokens in ${Math.round(all)} ms`;
  if (chat) talk.push({ role: "user", content: text }, { role: "assistant", content: said.textContent });
}

async function classify(article, signal) {
  const began = performance.now();
  const body = { model: at("model").value, input: at("text").value, store: at("store").checked };
  const answer = await (await ask("v1/classify", body, signal)).json();
  const [found] = answer.data;
  article.querySelector(".said").textContent = found.label;
  const table = article.querySelector(".scores");
  table.hidden = false;
  for (const [label, score] of Object.entries(found.scores).sort((a, b) => b[1] - a[1]).slice(0, 5)) {
    const row = table.tBodies[0].insertRow();
    row.insertCell().textContent = label;
    row.insertCell().textContent = score.toFixed(3);
    const meter = document.createElement("meter");
    meter.value = score;
    row.insertCell().append(meter);
  }
  article.querySelector(".times").textContent = `${Math.round(performance.now() - began)} ms, ${answer.usage.total_tokens} tokens`;
  rateable(article, answer.id);
}

async function draw(article, signal) {
  const began = performance.now();
  const body = {
    model: at("model").value, prompt: at("text").value, n: Number(at("count").value),
    ...(at("seed").value && { seed: Number(at("seed").value) }),
  };
  const answer = await (await ask("v1/images/generations", body, signal)).json();
  article.querySelector(".images").append(...answer.data.map((it, i) => {
    const image = new Image();
    image.src = `data:image/png;base64,${it.b64_json}`;
    image.alt = image.title = `${body.prompt}, seed ${answer.seed + i}`;
    return image;
  }));
  article.querySelector(".times").textContent = `${Math.round(performance.now() - began)} ms, ${answer.size}, seed ${answer.seed}`;
  rateable(article, answer.id);
}

async function transcribe(article, signal) {
  const began = performance.now();
  const form = new FormData();
  form.append("model", at("model").value);
  form.append("response_format", "verbose_json");
  form.append("file", at("file").files[0]);
  const response = await ask("v1/audio/transcriptions", form, signal);
  const answer = await response.json();
  article.querySelector(".said").textContent = answer.text;
  article.querySelector(".times").textContent = `${Math.round(performance.now() - began)} ms, ${answer.duration.toFixed(1)} s of sound`;
  rateable(article, response.headers.get("x-request-id"));
}

const DOES = { classification: classify, images: draw, transcription: transcribe };

at("ask").onsubmit = async (submit) => {
  submit.preventDefault();
  if (asking) return;
  const article = newAnswer(mode() === "transcription" ? at("file").files[0].name : at("text").value);
  asking = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    await (DOES[mode()] ?? write)(article, asking.signal);
    if (mode() === "chat") at("text").value = "";
  } catch (error) {
    const stopped = error.name === "AbortError";
    article.querySelector(".times").textContent = stopped ? "stopped" : "";
    if (!stopped) {
      article.querySelector(".said").textContent += error.message;
      article.querySelector(".said").classList.add("error");
    }
  }
  asking = null;
  at("send").disabled = false;
  at("stop").disabled = true;
};
at("stop").onclick = () => asking?.abort();
at("clear").onclick = () => {
  talk = [];
  at("answers").replaceChildren();
};
at("model").onchange = () => {
  talk = [];
  showModes();
};
at("modes").onchange = showModes;
at("key").onchange = look;
at("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
};
look();
setInterval(look, LOOK_MS);
