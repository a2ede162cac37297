// Read the form, follow the progress that the server streams, and show the images.

const $ = (id) => document.getElementById(id);
const form = $("settings");
const MANY_CLASSES = 20; // show the search field from this number of classes
const LONG_NAME = 6; // letters; phones show names this long above the images, not beside them
let maximum = Infinity;
let running = null; // {id, abort}

function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

function showStatus(text, { error = "", progress = null } = {}) {
  $("status").textContent = text;
  $("error").textContent = error;
  $("error").hidden = !error;
  $("progress").hidden = progress === null;
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
  $("names").querySelector("input").checked = true;
  $("search").hidden = model.classes.length < MANY_CLASSES;
  for (const name of model.schedulers) form.scheduler.append(new Option(name, name));
  form.guidance_scale.value = model.guidance_scale;
  form.num_inference_steps.value = model.num_inference_steps;
  form.num_inference_steps.max = model.max_inference_steps;
  form.images_per_class.value = Math.min(4, model.max_images);
  maximum = model.max_images;
  showCount();
}

const chosen = () => [...form.querySelectorAll("[name=class]:checked")].map((box) => +box.value);

function showCount() {
  const images = chosen().length * (parseInt(form.images_per_class.value) || 0);
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
$("dice").onclick = () => {
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
};

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

async function sample() {
  const values = Object.fromEntries(new FormData(form));
  delete values.class;
  const labels = chosen();
  const names = labels.map((id) => $("names").children[id].textContent);
  const columns = Math.max(1, parseInt(values.images_per_class) || 1);
  running = { id: null, abort: new AbortController() };
  $("make").disabled = true;
  $("cancel").disabled = false;
  showStatus("Sending the request …");
  if ($("result").getBoundingClientRect().top > innerHeight / 2) {
    $("result").scrollIntoView(); // on phones the result is below the form
  }
  try {
    const response = await fetch("images", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...values, class_labels: labels }),
      signal: running.abort.signal,
    });
    if (!response.ok) return showStatus("No images were sampled.", { error: await reason(response) });
    let last = { status: "running" };
    let grid = null;
    for await (const news of lines(response.body)) {
      last = news;
      running.id = news.id;
      if (news.status === "waiting") {
        showStatus(news.ahead ? `Waiting: ${news.ahead} ${news.ahead > 1 ? "requests" : "request"} ahead of yours.` : "Starting …");
      } else if (news.status === "running") {
        showStatus("Denoising …", { progress: news.done / news.total });
        if (news.picture) {
          grid ??= createCells(names, columns);
          showPicture(grid, `images/${news.id}/preview.jpg?${news.picture}`);
        }
      }
    }
    await showResult(last, grid);
  } catch (error) {
    if (error.name === "AbortError") showStatus("Cancelled.");
    else showStatus("No images were sampled.", { error: "The connection to the server was lost." });
  } finally {
    running = null;
    $("make").disabled = false;
    $("cancel").disabled = true;
  }
}

async function showResult(news, grid) {
  if (news.status === "done") {
    grid ??= createCells(news.rows, news.columns);
    await showPicture(grid, `images/${news.id}/cells.png`);
    showDownloads(news);
    showHeadLoad(news);
    showStatus("Done.");
  } else if (news.status === "cancelled") showStatus("Cancelled.");
  else showStatus("No images were sampled.", { error: news.error ?? "The server stopped during sampling." });
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

// ---- display: all cells show parts of one picture, which holds all images

function createCells(names, columns) {
  const cells = [];
  $("images").replaceChildren(
    ...names.map((name, row) => {
      const images = element("div", "", { className: "cells" });
      for (let column = 0; column < columns; column++) {
        const cell = element("div", "", { className: "cell", role: "img" });
        cell.ariaLabel = `${name}, image ${column + 1}`;
        const share = (place, places) => (places > 1 ? (100 * place) / (places - 1) : 0);
        cell.style.backgroundPosition = `${share(column, columns)}% ${share(row, names.length)}%`;
        cell.style.backgroundSize = `${100 * columns}% ${100 * names.length}%`;
        images.append(cell);
        cells.push(cell);
      }
      const line = element("div", "", { className: "class" });
      line.append(element("span", name), images);
      return line;
    }),
  );
  $("images").className = names.some((name) => name.length >= LONG_NAME) ? "long-names" : "";
  $("downloads").hidden = $("head-load").hidden = true;
  return { cells, columns, latest: 0 };
}

async function showPicture(grid, address) {
  const turn = ++grid.latest;
  const picture = new Image();
  picture.src = address;
  try {
    await picture.decode();
  } catch {
    return; // the server has already replaced or discarded this preview
  }
  if (turn < grid.latest) return;
  const side = picture.naturalWidth / grid.columns;
  const zoom = Math.max(1, Math.ceil(96 / side));
  $("images").style.setProperty("--side", `${Math.min(192, side * zoom)}px`);
  for (const cell of grid.cells) {
    cell.style.backgroundImage = `url("${picture.src}")`;
    cell.classList.toggle("enlarged", zoom > 1);
  }
}

function showDownloads({ id, name }) {
  Object.assign($("download"), { href: `images/${id}/grid.png`, download: name });
  Object.assign($("yaml"), { href: `images/${id}/settings.yaml`, target: "_blank" });
  $("downloads").hidden = false;
}

function showHeadLoad({ id, head_load: load }) {
  $("head-load").hidden = !load;
  if (!load) return;
  $("numbers").href = `images/${id}/head_load.json`;
  $("view").replaceChildren(...load.views.map((view, index) => new Option(view.name, index)));
  const draw = () => $("heat").replaceChildren(...heatMap(load, load.views[+$("view").value]));
  $("view").onchange = draw;
  draw();
}

function heatMap({ layers }, { shares }) {
  const heads = Math.max(...shares.map((row) => row.length));
  const top = element("tr");
  top.append(element("th"), ...Array.from({ length: heads }, (_, i) => element("th", `head ${i}`)));
  top.append(element("th", "balanced"));
  const rows = layers.map((layer, index) => {
    const row = element("tr");
    row.append(element("th", `layer ${layer.index}`));
    for (let head = 0; head < heads; head++) {
      const share = shares[index][head];
      const cell = element("td", share === undefined ? "" : Math.round(100 * share));
      cell.style.setProperty("--share", share ?? 0);
      row.append(cell);
    }
    row.append(element("th", Math.round(100 * layer.even)));
    return row;
  });
  return [top, ...rows];
}

showModel().catch(() => showStatus("", { error: "The server cannot be reached." }));
