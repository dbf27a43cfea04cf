// The page at /: sends requests as any client does, and shows the responses and their speed.
const element = (id) => document.getElementById(id);
const POLL_MS = 2000;
const TEXT_LABELS = { chat: "Your message", completion: "Text to complete", classification: "Text to classify", transcription: "Audio file to transcribe", images: "Image prompt" };
// Class of an option's label -> modes that have the option.
const OPTION_MODES = { generation: ["chat", "completion"], "images-only": ["images"], storable: ["chat", "completion", "classification"] };
let models = [];
let conversation = []; // messages of the chat
let inFlight = null; // AbortController of the request in flight

function headers(form) {
  const key = element("key").value.trim();
  return { ...(!form && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
}

async function sendRequest(path, body, signal) {
  const form = body instanceof FormData;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers: headers(form), body: form ? body : body && JSON.stringify(body), signal });
  if (!response.ok) {
    const errorBody = await response.json().catch(() => null);
    throw new Error(errorBody?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

const mode = () => document.querySelector('input[name="mode"]:checked').value;

function updateModes() {
  const modelTask = models.find((model) => model.id === element("model").value)?.task;
  const modes = modelTask === "completion" ? ["chat", "completion"] : [modelTask];
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.disabled = !modes.includes(input.value);
    if (input.disabled && input.checked) input.checked = false;
  }
  if (!document.querySelector('input[name="mode"]:checked')) {
    const first = document.querySelector('input[name="mode"]:not(:disabled)');
    if (first) first.checked = true;
  }
  const selected = document.querySelector('input[name="mode"]:checked')?.value;
  element("send").disabled = !selected;
  element("text-label").textContent = TEXT_LABELS[selected] ?? "This model cannot be tried here";
  for (const label of document.querySelectorAll("label[class]")) {
    label.hidden = ![...label.classList].some((name) => OPTION_MODES[name]?.includes(selected));
  }
  const needsFile = selected === "transcription";
  element("text").hidden = needsFile;
  element("text").required = !needsFile;
  element("file").hidden = !needsFile;
  element("file").required = needsFile;
}

async function refresh() {
  if (document.hidden) return;
  try {
    if (!models.length) {
      models = (await (await sendRequest("v1/models")).json()).data;
      element("model").replaceChildren(...models.map((model) => new Option(`${model.id} (${model.task})`, model.id)));
      updateModes();
    }
    const replicas = (await (await sendRequest("v1/replicas")).json()).data;
    element("replicas").replaceChildren(...replicas.map(replicaRow));
    element("state").textContent = `${models.length} model${models.length > 1 ? "s" : ""}, ${replicas.length} replica${replicas.length === 1 ? "" : "s"}`;
  } catch (error) {
    element("state").textContent = error.message;
  }
}

function replicaRow(replica) {
  const row = document.createElement("tr");
  for (const text of [replica.model, replica.version, replica.replica]) row.insertCell().textContent = text;
  for (const count of [replica.running, replica.waiting]) {
    const cell = row.insertCell();
    cell.className = "number";
    cell.textContent = count ?? "";
  }
  const cell = row.insertCell();
  if (replica.cache_tokens) {
    const meter = document.createElement("meter");
    Object.assign(meter, { max: replica.cache_tokens, value: replica.cached_tokens, title: `${replica.cached_tokens} of ${replica.cache_tokens} tokens` });
    cell.append(meter);
  }
  return row;
}

function addResponse(input) {
  const article = element("response").content.firstElementChild.cloneNode(true);
  article.querySelector(".input").textContent = input;
  element("responses").prepend(article);
  return article;
}

function enableRating(article, request) {
  article.dataset.request = request;
  for (const [name, other] of [["up", "down"], ["down", "up"]]) {
    const button = article.querySelector(`.${name}`);
    button.disabled = false;
    button.onclick = async () => {
      try {
        await sendRequest("v1/feedback", { request, rating: name });
        button.setAttribute("aria-pressed", "true");
        article.querySelector(`.${other}`).setAttribute("aria-pressed", "false");
      } catch (error) {
        article.querySelector(".timing").textContent = error.message;
      }
    };
  }
}

async function* readEvents(response) {
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

async function generate(article, signal) {
  const chat = mode() === "chat";
  const text = element("text").value;
  const startedAt = performance.now();
  const body = {
    model: element("model").value, max_tokens: Number(element("tokens").value), temperature: Number(element("temperature").value),
    stream: true, stream_options: { include_usage: true }, store: element("store").checked,
    ...(element("seed").value && { seed: Number(element("seed").value) }),
    ...(chat ? { messages: [...conversation, { role: "user", content: text }] } : { prompt: text }),
  };
  const response = await sendRequest(chat ? "v1/chat/completions" : "v1/completions", body, signal);
  const output = article.querySelector(".output");
  let firstToken = 0;
  let usage = null;
  for await (const event of readEvents(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    if (!article.dataset.request && event.id) enableRating(article, event.id);
    const choice = event.choices[0];
    if (!choice) continue;
    firstToken ||= performance.now() - startedAt;
    output.textContent += (chat ? choice.delta.content : choice.text) ?? "";
  }
  const total = performance.now() - startedAt;
  const tokens = usage?.completion_tokens ?? 0;
  const rate = tokens > 1 && total > firstToken ? `, ${Math.round((1000 * (tokens - 1)) / (total - firstToken))} tokens/s` : "";
  article.querySelector(".timing").textContent = `first token ${Math.round(firstToken)} ms${rate}, ${tokens} tokens in ${Math.round(total)} ms`;
  if (chat) conversation.push({ role: "user", content: text }, { role: "assistant", content: output.textContent });
}

async function classify(article, signal) {
  const startedAt = performance.now();
  const body = { model: element("model").value, input: element("text").value, store: element("store").checked };
  const response = await (await sendRequest("v1/classify", body, signal)).json();
  const [prediction] = response.data;
  article.querySelector(".output").textContent = prediction.label;
  const table = article.querySelector(".scores");
  table.hidden = false;
  for (const [label, score] of Object.entries(prediction.scores).sort((a, b) => b[1] - a[1]).slice(0, 5)) {
    const row = table.tBodies[0].insertRow();
    row.insertCell().textContent = label;
    row.insertCell().textContent = score.toFixed(3);
    const meter = document.createElement("meter");
    meter.value = score;
    row.insertCell().append(meter);
  }
  article.querySelector(".timing").textContent = `${Math.round(performance.now() - startedAt)} ms, ${response.usage.total_tokens} tokens`;
  enableRating(article, response.id);
}

async function generateImages(article, signal) {
  const startedAt = performance.now();
  const body = {
    model: element("model").value, prompt: element("text").value, n: Number(element("count").value),
    ...(element("seed").value && { seed: Number(element("seed").value) }),
  };
  const response = await (await sendRequest("v1/images/generations", body, signal)).json();
  article.querySelector(".images").append(...response.data.map((item, i) => {
    const image = new Image();
    image.src = `data:image/png;base64,${item.b64_json}`;
    image.alt = image.title = `${body.prompt}, seed ${response.seed + i}`;
    return image;
  }));
  article.querySelector(".timing").textContent = `${Math.round(performance.now() - startedAt)} ms, ${response.size}, seed ${response.seed}`;
  enableRating(article, response.id);
}

async function transcribe(article, signal) {
  const startedAt = performance.now();
  const form = new FormData();
  form.append("model", element("model").value);
  form.append("response_format", "verbose_json");
  form.append("file", element("file").files[0]);
  const response = await sendRequest("v1/audio/transcriptions", form, signal);
  const transcript = await response.json();
  article.querySelector(".output").textContent = transcript.text;
  article.querySelector(".timing").textContent = `${Math.round(performance.now() - startedAt)} ms, ${transcript.duration.toFixed(1)} s of audio`;
  enableRating(article, response.headers.get("x-request-id"));
}

const TASKS = { classification: classify, images: generateImages, transcription: transcribe };

element("request").onsubmit = async (event) => {
  event.preventDefault();
  if (inFlight) return;
  const article = addResponse(mode() === "transcription" ? element("file").files[0].name : element("text").value);
  inFlight = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  try {
    await (TASKS[mode()] ?? generate)(article, inFlight.signal);
    if (mode() === "chat") element("text").value = "";
  } catch (error) {
    const stopped = error.name === "AbortError";
    article.querySelector(".timing").textContent = stopped ? "stopped" : "";
    if (!stopped) {
      article.querySelector(".output").textContent += error.message;
      article.querySelector(".output").classList.add("error");
    }
  }
  inFlight = null;
  element("send").disabled = false;
  element("stop").disabled = true;
};
element("stop").onclick = () => inFlight?.abort();
element("clear").onclick = () => {
  conversation = [];
  element("responses").replaceChildren();
};
element("model").onchange = () => {
  conversation = [];
  updateModes();
};
element("modes").onchange = updateModes;
element("key").onchange = refresh;
element("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("request").requestSubmit();
};
refresh();
setInterval(refresh, POLL_MS);
