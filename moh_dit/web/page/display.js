// Show the images of a result, its caption and its head load.

const $ = (id) => document.getElementById(id);
const LONG_NAME = 6; // letters; phones show names this long above the images, not beside them

export function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

/** Remove the images on display, with their downloads and head load. */
export function clearResult() {
  $("images").replaceChildren();
  $("downloads").hidden = $("head-load").hidden = $("caption").hidden = true;
}

/** Create one cell per image. All cells show parts of one picture, which holds all images. */
export function createCells(names, columns, columnNames = []) {
  clearResult();
  const cells = [];
  const lines = names.map((name, row) => {
    const images = element("div", "", { className: "cells" });
    for (let column = 0; column < columns; column++) {
      const cell = element("div", "", { className: "cell", role: "img" });
      cell.ariaLabel = `${name}, ${columnNames[column] ?? `image ${column + 1}`}`;
      const share = (place, places) => (places > 1 ? (100 * place) / (places - 1) : 0);
      cell.style.backgroundPosition = `${share(column, columns)}% ${share(row, names.length)}%`;
      cell.style.backgroundSize = `${100 * columns}% ${100 * names.length}%`;
      images.append(columnNames[column] ? captioned(cell, columnNames[column]) : cell);
      cells.push(cell);
    }
    const line = element("div", "", { className: "class" });
    line.append(element("span", name), images);
    return line;
  });
  $("images").replaceChildren(...lines);
  $("images").className = names.some((name) => name.length >= LONG_NAME) ? "long-names" : "";
  return { cells, columns, latest: 0 };
}

function captioned(cell, name) {
  const box = element("div", "", { className: "captioned" });
  box.append(cell, element("span", name, { ariaHidden: "true" })); // the cell itself has a label
  return box;
}

/** Show a picture in the cells, unless a later one has been shown meanwhile. */
export async function showPicture(grid, address) {
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

/** Show a finished result: images, caption, downloads and head load. */
export async function showResult(result) {
  const { news, files } = result;
  await showPicture(createCells(news.rows, news.columns, news.column_names), files["cells.png"]);
  $("caption").textContent = result.caption;
  Object.assign($("download"), { href: files["grid.png"], download: news.name });
  $("yaml").href = files["settings.yaml"];
  $("downloads").hidden = $("caption").hidden = false;
  showHeadLoad(news.head_load, files["head_load.json"]);
}

function showHeadLoad(load, address) {
  $("head-load").hidden = !load;
  if (!load) return;
  $("numbers").href = address;
  $("view").replaceChildren(...load.views.map((view, index) => new Option(view.name, index)));
  const draw = () => $("heat").replaceChildren(...heatMap(load, load.views[+$("view").value]));
  $("view").onchange = draw;
  draw();
}

/** Return table rows: layers × heads. Heads are numbered as in the layer, shared heads first. */
function heatMap({ layers }, { shares }) {
  const first = Math.min(...layers.map((layer) => layer.shared_heads));
  const end = Math.max(...layers.map((layer, index) => layer.shared_heads + shares[index].length));
  const top = element("tr");
  const numbers = Array.from({ length: end - first }, (_, i) => first + i);
  const head = (text) => element("th", text, { scope: "col" });
  top.append(element("td"), ...numbers.map((i) => head(`head ${i}`)), head("balanced"));
  const rows = layers.map((layer, index) => {
    const row = element("tr");
    row.append(element("th", `layer ${layer.index}`, { scope: "row" }));
    for (const number of numbers) {
      const share = shares[index][number - layer.shared_heads];
      const cell = element("td", share === undefined ? "" : Math.round(100 * share));
      cell.style.setProperty("--share", share ?? 0);
      row.append(cell);
    }
    row.append(element("td", Math.round(100 * layer.even), { className: "even" }));
    return row;
  });
  return [top, ...rows];
}
