// Keep the results of this page, in the memory of the browser, until the page is closed.

import { element } from "./display.js";

const $ = (id) => document.getElementById(id);
const LARGEST_GALLERY = 60; // results; older ones are removed

/** Download the files of a finished request, so that they outlast the memory of the server. */
export async function fetchFiles(id, names) {
  const files = {};
  for (const name of names) {
    const response = await fetch(`images/${id}/${name}`);
    if (!response.ok) throw new Error((await response.json()).error);
    files[name] = URL.createObjectURL(await response.blob());
  }
  return files;
}

/** Add a result to the front; `choose(result, button)` is called when a visitor chooses it. */
export function addToGallery(result, choose) {
  const item = element("li");
  const button = element("button", "", { type: "button" });
  const picture = element("img", "", { src: result.files["cells.png"], alt: "" });
  button.append(picture, element("span", result.caption));
  button.onclick = () => choose(result, button);
  item.append(button);
  $("made").prepend(item);
  $("gallery").hidden = false;
  select(button);
  while ($("made").children.length > LARGEST_GALLERY) $("made").lastChild.remove();
}

/** Mark the result on display, or none. */
export function select(button = null) {
  for (const other of $("made").querySelectorAll("button")) other.removeAttribute("aria-current");
  button?.setAttribute("aria-current", "true");
}
