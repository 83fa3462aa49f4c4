// Starts the page: the token, what the set is, and what keys, clicks and dropped files do.

import { Detail, nameOf } from "./detail.js";
import { Wall } from "./wall.js";

const $ = (id) => document.getElementById(id);

// ---- The endpoint.

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the endpoint does not answer; is the job still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const error = new Error(said.error ?? `the endpoint answered with ${answer.status}`);
  error.status = answer.status;
  throw error;
}

const asJson = (path, options) => ask(path, options).then((answer) => answer.json());

const api = {
  set: null,
  say,
  rows: (by, start, count) =>
    asJson(`/rows?${new URLSearchParams({ by, start, count })}`).then(
      (answer) => answer.rows,
      (error) => { say(error.message, true); throw error; },
    ),
  search: (query) =>
    asJson("/search", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(query),
    }),
  searchFile: (file, k) => asJson(`/search?k=${k}`, upload(file)),
  lookFile: (what, file) => ask(`/look/${what}`, upload(file)).then((answer) => answer.blob()),
};

function upload(file) {
  return { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file };
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").hidden = !text;
  $("message").classList.toggle("error", isError);
}

// A thumbnail of a row, or its name where the images cannot be reached.
function picture(row, side, name = "") {
  const box = document.createElement("div");
  box.className = "lacking";
  box.textContent = nameOf(row);
  if (!api.set.images) return box;
  const image = document.createElement("img");
  image.className = name;
  image.decoding = "async";
  image.addEventListener("error", () => image.replaceWith(box));
  image.alt = [row.label, nameOf(row)].filter(Boolean).join(", ");
  const size = Math.min(1024, 64 * Math.ceil((side * Math.min(window.devicePixelRatio, 2)) / 64));
  image.src = `/image/${encodeURIComponent(row.image_id)}?size=${size}`;
  return image;
}

// ---- The page.

const detail = new Detail($("detail"), { api, picture, closed: () => wall.closed() });
const wall = new Wall($("wall"), $("space"), {
  rows: api.rows,
  picture,
  open: (row) => { say(""); detail.row(row); },
});

async function enter(token) {
  await ask("/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
}

async function start() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    history.replaceState(null, "", location.pathname); // it stays in no history and no bookmark
    await enter(token);
  }
  api.set = await asJson("/set");
  show(api.set);
}

function show(set) {
  $("enter").hidden = true;
  $("controls").hidden = false;
  $("count").textContent = set.count === 1 ? "1 image" : `${set.count.toLocaleString("en")} images`;
  $("about").textContent = set.model ? `Vectors of ${set.model.name}` : "No model: images of the set can be searched with";
  document.title = $("count").textContent;
  $("choose").hidden = !set.model || !set.count;
  for (const grouping of set.groupings) {
    $("by").add(new Option(grouping.name === "all" ? "nothing" : grouping.name, grouping.name));
  }
  $("wall").hidden = !set.count;
  if (!set.count) return say("There are no vectors: start with vectors=FOLDER to see and search images.");
  regroup();
  $("wall").focus();
}

function regroup() {
  const grouping = api.set.groupings.find((one) => one.name === $("by").value);
  const options = grouping.groups.map((group, i) => new Option(`${group.name} (${group.count.toLocaleString("en")})`, i));
  $("group").replaceChildren(...options);
  $("jump").hidden = grouping.groups.length < 2;
  wall.show(grouping);
}

function searchWith(file) {
  if (!file) return;
  if (!api.set?.model || !api.set.count) return say("There is no model, so an image cannot be searched with.", true);
  if (file.size > api.set.max_bytes) return say(`The file has more than ${api.set.max_bytes.toLocaleString("en")} bytes.`, true);
  say("");
  detail.file(file);
}

$("by").addEventListener("change", regroup);
$("group").addEventListener("change", () => wall.toGroup(Number($("group").value)));
$("file").addEventListener("change", (event) => {
  searchWith(event.target.files[0]);
  event.target.value = ""; // the same file can be chosen again
});
$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  say("");
  enter($("token").value).then(start).catch(failed);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && detail.isOpen) detail.close();
});

let inside = 0; // dragenter and dragleave come for each element that the mouse crosses
for (const [kind, step] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(kind, (event) => {
    inside += step;
    $("drop").hidden = inside <= 0;
    event.preventDefault();
  });
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  searchWith(event.dataTransfer.files[0]);
});

function failed(error) {
  if (error.status === 401) {
    $("enter").hidden = false;
    $("token").focus();
    return say("This page needs the token that the job printed.", true);
  }
  say(error.message, true);
}

start().catch(failed);
