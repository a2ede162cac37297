// Read the form, follow the progress that the server streams, and keep the results.

import { clearResult, createCells, element, showPicture, showResult } from "./display.js";
import { addToGallery, fetchFiles, select } from "./gallery.js";

const $ = (id) => document.getElementById(id);
const form = $("settings");
const MANY_CLASSES = 20; // show the search field from this number of classes
const FIRST_CLASSES = 4; // classes of the grid that the page makes for a model without samples
const FIRST_STEPS = 20;
let maximum = Infinity;
let running = null; // {id, abort}
let shown = null; // the result on display

function showStatus(text, { error = "", progress = null, rate = "" } = {}) {
  if ($("status").textContent !== text) $("status").textContent = text;
  if ($("error").textContent !== error) $("error").textContent = error;
  $("error").hidden = !error;
  $("progress").hidden = progress === null;
  $("rate").textContent = rate;
  $("rate").hidden = !rate;
  if (progress !== null) $("progress").value = progress;
}

// ---- settings

async function showModel() {
  const model = await (await fetch("model")).json();
  $("model").textContent = model.name;
  document.title = `${model.name} · MoH-DiT`;
  for (const [id, name] of model.classes.entries()) {
    const label = element("label");
    const box = element("input", "", { type: "checkbox", name: "class", value: id });
    label.append(box, element("span", name));
    $("names").append(label);
  }
  $("search").hidden = model.classes.length < MANY_CLASSES;
  for (const { value, name } of model.schedulers) form.scheduler.append(new Option(name, value));
  form.guidance_scale.value = model.guidance_scale;
  form.num_inference_steps.value = model.num_inference_steps;
  form.num_inference_steps.max = model.max_inference_steps;
  form.images_per_class.value = Math.min(4, model.max_images);
  maximum = model.max_images;
  if (model.first_picture) {
    $("first-image").src = "first";
    $("first").hidden = false;
    $("names").querySelector("input").checked = true;
    showCount();
  } else {
    await makeFirst(model);
  }
}

/** Sample a small grid, so that the page opens with something to look at. */
async function makeFirst(model) {
  const boxes = [...$("names").querySelectorAll("input")];
  boxes.slice(0, Math.min(FIRST_CLASSES, maximum)).forEach((box) => (box.checked = true));
  const [images, steps] = [form.images_per_class.value, form.num_inference_steps.value];
  form.images_per_class.value = 1;
  form.num_inference_steps.value = Math.min(FIRST_STEPS, steps);
  showCount();
  await sample();
  form.images_per_class.value = Math.min(images, Math.max(1, Math.floor(maximum / chosen().length)));
  form.num_inference_steps.value = steps;
  showCount();
}

const chosen = () => [...form.querySelectorAll("[name=class]:checked")].map((box) => +box.value);

/** Return the settings of a request: those of the form that its mode uses. */
function readSettings() {
  const values = Object.fromEntries(new FormData(form));
  const columns = {
    images: parseInt(values.images_per_class) || 0,
    interpolate: parseInt(values.interpolate) || 0,
    sweep: (values.guidance_scales ?? "").split(",").filter((part) => part.trim()).length,
  }[values.mode];
  for (const field of form.querySelectorAll("[data-mode] [name]")) {
    if (!field.closest("[data-mode]").dataset.mode.split(" ").includes(values.mode)) {
      delete values[field.name];
    }
  }
  delete values.class;
  delete values.mode;
  return { values: { ...values, class_labels: chosen() }, columns };
}

function showCount() {
  for (const label of form.querySelectorAll("[data-mode]")) {
    label.hidden = !label.dataset.mode.split(" ").includes(form.mode.value);
  }
  const images = chosen().length * readSettings().columns;
  $("count").textContent = `${images} of at most ${maximum} images`;
}

function setVisibleClasses(checked) {
  for (const label of $("names").children) {
    if (!label.hidden) label.firstChild.checked = checked;
  }
  showCount();
}

form.addEventListener("input", showCount);
$("all").onclick = () => setVisibleClasses(true);
$("none").onclick = () => setVisibleClasses(false);
$("search").oninput = () => {
  const part = $("search").value.toLowerCase();
  for (const label of $("names").children) {
    const found = label.textContent.toLowerCase().includes(part);
    label.hidden = !found && !label.firstChild.checked; // chosen classes stay visible
  }
};
$("search").onkeydown = (event) => event.key === "Enter" && event.preventDefault();
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
$("dice").onclick = () => {
  form.seed.value = newSeed();
};

/** Fill the form with the settings of a result. */
function restore({ form: fields, labels }) {
  for (const [name, value] of Object.entries(fields)) form.elements[name].value = value;
  for (const box of form.querySelectorAll("[name=class]")) box.checked = labels.includes(+box.value);
  showCount();
}

// ---- sampling

form.onsubmit = (event) => {
  event.preventDefault();
  if (!running) sample();
};
$("cancel").onclick = () => {
  $("cancel").disabled = true;
  if (running.id) fetch(`images/${running.id}`, { method: "DELETE" });
  else running.abort.abort();
};
$("again").onclick = () => {
  if (running) return;
  restore(shown);
  form.seed.value = newSeed();
  sample();
};

async function sample() {
  const { values, columns } = readSettings();
  const names = values.class_labels.map((id) => $("names").children[id].textContent);
  const kept = Object.fromEntries(new FormData(form));
  delete kept.class;
  const result = { form: kept, labels: values.class_labels, caption: describe(values, names) };
  running = { id: null, abort: new AbortController() };
  $("make").disabled = $("again").disabled = true;
  $("cancel").disabled = false;
  $("first").hidden = true;
  clearResult();
  select();
  shown = null;
  showStatus("Sending the request …");
  if ($("result").getBoundingClientRect().top > innerHeight / 2) {
    $("result").scrollIntoView(); // on phones the result is below the form
  }
  try {
    const response = await fetch("images", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(values),
      signal: running.abort.signal,
    });
    if (!response.ok) return fail(await reason(response));
    let last = { status: "running" };
    let grid = null;
    for await (const news of lines(response.body)) {
      last = news;
      running.id = news.id;
      if (news.status === "waiting") {
        showStatus(news.ahead ? `Waiting: ${news.ahead} ${news.ahead > 1 ? "requests" : "request"} ahead of yours.` : "Starting …");
      } else if (news.status === "running") {
        showStatus("Denoising …", { progress: news.done / news.total, rate: describeRate(news) });
        if (news.picture) {
          grid ??= createCells(names, Math.max(1, columns));
          showPicture(grid, `images/${news.id}/preview.jpg?${news.picture}`);
        }
      }
    }
    await finish(last, result);
  } catch (error) {
    if (error.name === "AbortError") cancelled();
    else fail("The connection to the server was lost.");
  } finally {
    running = null;
    $("make").disabled = $("again").disabled = false;
    $("cancel").disabled = true;
  }
}

async function finish(news, result) {
  if (news.status === "done") {
    const files = ["cells.png", "grid.png", "settings.yaml"];
    if (news.head_load) files.push("head_load.json");
    Object.assign(result, { news, files: await fetchFiles(news.id, files) });
    await show(result);
    addToGallery(result, choose);
    showStatus("Done.");
  } else if (news.status === "cancelled") cancelled();
  else fail(news.error ?? "The server stopped during sampling.");
}

/** Show a result that was chosen in the gallery, unless a request is running. */
function choose(result, button) {
  if (running) return;
  select(button);
  show(result);
}

async function show(result) {
  shown = result;
  $("first").hidden = true;
  await showResult(result);
  showStatus("Done.");
}

function cancelled() {
  clearResult();
  showStatus("Cancelled.");
}

function fail(error) {
  clearResult();
  showStatus("No images were sampled.", { error });
  $("error").scrollIntoView({ block: "nearest" });
}

function describe(values, names) {
  const steps = `${values.num_inference_steps} steps`;
  const guidance = `guidance ${values.guidance_scales ?? values.guidance_scale}`;
  const what = values.interpolate ? `blend, ${values.interpolate} images` : "";
  const parts = [names.join(", "), what, guidance, steps, values.scheduler, `seed ${values.seed}`];
  return parts.filter(Boolean).join(" · ");
}

function describeRate({ done, total, images, seconds }) {
  const [step, steps] = [Math.floor(done / images), Math.round(total / images)];
  if (!done || !seconds) return `Step ${step} of ${steps}`;
  const rate = done / images / seconds;
  const left = Math.ceil((seconds * (total - done)) / done);
  const time = left < 90 ? `${left} s` : `${Math.round(left / 60)} min`;
  return `Step ${step} of ${steps} · ${rate.toPrecision(2)} steps/s · about ${time} left`;
}

async function reason(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) yield JSON.parse(line);
  }
}

showModel().catch(() => showStatus("", { error: "The server cannot be reached." }));
