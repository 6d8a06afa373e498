"use strict";
// The page asks nobody but the endpoint it came from. What the endpoint says is put in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const PAGE = 24;
const state = { query: null, next: null, pictures: {}, asked: 0 };

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.detail || `${answer.status} ${answer.statusText}`);
  return value;
}

/** Run what a person asked for; what goes wrong is said, and the answer to an older question is not shown. */
async function busy(form, work) {
  const mine = ++state.asked;
  const button = form && form.querySelector("button[type=submit]");
  if (button) button.disabled = true;
  say("…");
  try {
    const show = await work();
    if (mine === state.asked) { say(""); show(); }
  } catch (error) {
    if (mine === state.asked) say(error.message, true);
  } finally {
    if (button) button.disabled = false;
  }
}

// ---- Views: the part of the address behind # says which, and what is like which item

const VIEWS = ["search", "classify", "map", "model"];
const there = (view) => !document.querySelector(`nav a[data-view=${view}]`).hidden;

function route() {
  const [wanted, argument] = location.hash.slice(1).split("/");
  const view = VIEWS.includes(wanted) && there(wanted) ? wanted : VIEWS.find(there);
  if ($(`view-${view}`).hidden) say("");
  for (const name of VIEWS) {
    $(`view-${name}`).hidden = name !== view;
    const link = document.querySelector(`nav a[data-view=${name}]`);
    if (name === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (view === "search" && argument !== undefined) search({ item: Number(argument), target: "images" });
  if (view === "map") drawMap();
}

// ---- Pictures: chosen, dropped or pasted

/** Dropped anywhere in the view: beside the field the browser would leave the page for the picture. */
function pictureInput(name, changed) {
  const drop = $(`${name}-drop`), file = $(`${name}-file`), shown = $(`${name}-picture`);
  const take = (chosen) => {
    if (!chosen) return;
    const reader = new FileReader();
    reader.onload = () => {
      state.pictures[name] = reader.result;
      shown.src = reader.result;
      shown.alt = `The picture that was chosen: ${chosen.name || "pasted"}`;
      shown.hidden = false;
      changed();
    };
    reader.readAsDataURL(chosen);
  };
  file.addEventListener("change", () => take(file.files[0]));
  const here = (event) => !$(`view-${name}`).hidden && event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => { if (here(event)) { event.preventDefault(); drop.classList.add("over"); } });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (here(event)) { event.preventDefault(); take(event.dataTransfer.files[0]); }
  });
  document.addEventListener("paste", (event) => {
    if (!$(`view-${name}`).hidden && event.clipboardData.files.length) take(event.clipboardData.files[0]);
  });
}

function clearPicture() {
  delete state.pictures.search;
  $("search-file").value = "";
  $("search-picture").hidden = $("search-clear").hidden = $("weight-label").hidden = true;
}

// ---- Search

function filters() {
  const field = $("filter-field").value, op = $("filter-op").value, text = $("filter-value").value;
  if (!field || text === "") return [];
  const numeric = $("filter-field").selectedOptions[0].dataset.kind !== "string";
  return [{ field, op, value: numeric ? Number(text) : text }];
}

function search(query) {
  state.query = query;
  busy($("search-form"), async () => {
    const found = await ask("v1/search", { ...query, limit: PAGE });
    return () => { $("gallery").replaceChildren(); show(found); };
  });
}

function show(found) {
  for (const one of found.results) {
    const caption = one.caption || one.uid;
    const about = make("span", { class: "about" }, make("span", { class: "caption" }, caption), make("span", { class: "score" }, one.score.toFixed(3)));
    const link = make("a", { href: `#search/${one.item}`, title: "More like this" });
    if (one.thumbnail) link.append(make("img", { src: one.thumbnail, alt: caption, loading: "lazy" }));
    link.append(about);
    $("gallery").append(make("li", {}, link));
  }
  state.next = found.next_offset;
  $("more").hidden = state.next === null;
  const count = $("gallery").children.length;
  say(count ? `${count} results` : "Nothing is found.");
}

function onSearch(event) {
  event.preventDefault();
  const words = $("words").value.trim(), image = state.pictures.search;
  if (!words && !image) { say("Write some words, or choose a picture.", true); $("words").focus(); return; }
  const query = { target: $("target").value, filters: filters() };
  if (words) query.text = words;
  if (image) query.image = image;
  if (words && image) query.text_weight = Number($("weight").value);
  if (location.hash !== "#search") history.replaceState(null, "", "#search");
  search(query);
}

function more() {
  const before = $("gallery").children.length;
  busy(null, async () => {
    const found = await ask("v1/search", { ...state.query, limit: PAGE, offset: state.next });
    return () => { show(found); $("gallery").children[before]?.querySelector("a").focus(); };
  });
}

/** Arrow keys go from picture to picture. */
function moveInGallery(event) {
  const links = [...$("gallery").querySelectorAll("a")], at = links.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = links.filter((link) => link.offsetTop === links[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: links.length - 1 - at }[event.key];
  if (step === undefined || !links[at + step]) return;
  event.preventDefault();
  links[at + step].focus();
}

// ---- Classify

const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

function onClassify(event) {
  event.preventDefault();
  const image = state.pictures.classify, set = $("label-set").value;
  if (!image) { say("Choose a picture first.", true); $("classify-file").focus(); return; }
  const body = set ? { image, label_set: set, top_k: 20 } : { image, labels: lines("labels"), top_k: 20 };
  if (!set && lines("templates").length) body.templates = lines("templates");
  busy($("classify-form"), async () => {
    const { scores } = await ask("v1/classify", body);
    return () => {
      $("bars").replaceChildren(...scores.map(({ label, score }) => {
        const bar = make("div", { class: "bar" });
        bar.style.width = `${Math.max(0.5, 100 * score)}%`;
        return make("li", {}, make("span", { class: "label" }, label), make("div", { class: "track", "aria-hidden": "true" }, bar), make("span", { class: "score" }, `${(100 * score).toFixed(1)} %`));
      }));
      say(`${scores[0].label}: ${(100 * scores[0].score).toFixed(1)} %`);
    };
  });
}

// ---- Map

const map = { points: null, chosen: -1, zoom: 1, x: 0.5, y: 0.5 };

function place(i) {
  const canvas = $("canvas"), width = canvas.clientWidth, height = canvas.clientHeight, margin = 16;
  return [
    width / 2 + (map.points.x[i] - map.x) * map.zoom * (width - 2 * margin),
    height / 2 + (map.points.y[i] - map.y) * map.zoom * (height - 2 * margin),
  ];
}

async function drawMap() {
  if (!map.points) {
    try { map.points = await ask("v1/search/map"); } catch (error) { say(error.message, true); return; }
    if (!map.points.item.length) { say("There are too few pictures for a map."); return; }
    $("canvas").dataset.points = map.points.item.length;
  }
  const canvas = $("canvas"), ratio = devicePixelRatio || 1, context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  context.scale(ratio, ratio);
  context.fillStyle = style.getPropertyValue("--accent");
  context.globalAlpha = 0.65;
  const radius = Math.min(7, 2.5 + map.zoom / 2);
  for (let i = 0; i < map.points.item.length; i++) {
    const [x, y] = place(i);
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.fill();
  }
  if (map.chosen >= 0) {
    const [x, y] = place(map.chosen);
    context.globalAlpha = 1;
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 3;
    context.beginPath();
    context.arc(x, y, radius + 4, 0, 7);
    context.stroke();
  }
}

function choose(i) {
  if (i < 0 || i === map.chosen) return;
  map.chosen = i;
  const item = map.points.item[i], caption = map.points.caption[i] || `item ${item}`;
  $("map-picture").src = `v1/search/items/${item}/thumbnail`;
  $("map-picture").alt = caption;
  $("map-caption").textContent = caption;
  $("map-card").hidden = false;
  drawMap();
}

function nearest(x, y, allowed = () => true) {
  let best = -1, least = Infinity;
  for (let i = 0; i < map.points.item.length; i++) {
    const [px, py] = place(i), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least && allowed(px - x, py - y, i)) [best, least] = [i, distance];
  }
  return best;
}

function zoom(factor, x = map.x, y = map.y) {
  const before = map.zoom;
  map.zoom = Math.min(40, Math.max(1, map.zoom * factor));
  map.x = map.zoom === 1 ? 0.5 : x + (map.x - x) * before / map.zoom;
  map.y = map.zoom === 1 ? 0.5 : y + (map.y - y) * before / map.zoom;
  drawMap();
}

/** Towards the chosen picture. */
const zoomIn = () => zoom(1.4, ...(map.chosen >= 0 ? [map.points.x[map.chosen], map.points.y[map.chosen]] : []));

function onMapKey(event) {
  if (!map.points || !map.points.item.length) return;
  const ahead = {
    ArrowRight: (dx, dy) => dx > 0.5 && Math.abs(dy) <= 2 * dx, ArrowLeft: (dx, dy) => dx < -0.5 && Math.abs(dy) <= -2 * dx,
    ArrowDown: (dx, dy) => dy > 0.5 && Math.abs(dx) <= 2 * dy, ArrowUp: (dx, dy) => dy < -0.5 && Math.abs(dx) <= -2 * dy,
  }[event.key];
  if (ahead) {
    const [x, y] = map.chosen >= 0 ? place(map.chosen) : [$("canvas").clientWidth / 2, $("canvas").clientHeight / 2];
    choose(map.chosen >= 0 ? nearest(x, y, (dx, dy, i) => i !== map.chosen && ahead(dx, dy)) : nearest(x, y));
  } else if (event.key === "+" || event.key === "=") zoomIn();
  else if (event.key === "-") zoom(1 / 1.4);
  else if (event.key === "Enter" && map.chosen >= 0) $("map-like").click();
  else return;
  event.preventDefault();
}

function setUpMap() {
  const canvas = $("canvas");
  let dragged = null;
  canvas.addEventListener("keydown", onMapKey);
  canvas.addEventListener("pointerdown", (event) => { dragged = { x: event.offsetX, y: event.offsetY, far: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (!map.points || !map.points.item.length) return;
    if (!dragged) { choose(nearest(event.offsetX, event.offsetY, (dx, dy) => dx * dx + dy * dy < 900)); return; }
    const dx = event.offsetX - dragged.x, dy = event.offsetY - dragged.y;
    if (Math.abs(dx) + Math.abs(dy) > 4) dragged.far = true;
    if (!dragged.far) return;
    map.x -= dx / map.zoom / canvas.clientWidth;
    map.y -= dy / map.zoom / canvas.clientHeight;
    Object.assign(dragged, { x: event.offsetX, y: event.offsetY });
    drawMap();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (dragged && !dragged.far && map.points) choose(nearest(event.offsetX, event.offsetY));
    dragged = null;
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, map.x + (event.offsetX / canvas.clientWidth - 0.5) / map.zoom, map.y + (event.offsetY / canvas.clientHeight - 0.5) / map.zoom);
  }, { passive: false });
  $("zoom-in").addEventListener("click", zoomIn);
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.4));
  $("map-like").addEventListener("click", () => { location.hash = `#search/${map.points.item[map.chosen]}`; });
  addEventListener("resize", () => { if (!$("view-map").hidden) drawMap(); });
}

// ---- Model

function rows(pairs) {
  return make("table", {}, make("tbody", {}, ...pairs.filter(([, value]) => value !== null && value !== "").map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, String(value))))));
}

function showModels(models, about) {
  for (const model of models) {
    for (const one of model.versions) {
      $("cards").append(
        make("h3", {}, model.versions.length > 1 ? `${model.id}: ${one.version}, ${one.percent} % of requests` : model.id),
        rows([
          ["Version", one.version], ["Answers", model.endpoints.join(", ")], ["Recipe", one.recipe], ["Parameters", one.parameters.toLocaleString("en")],
          ["Dimensions", one.dimensions], ["Images", `${one.image_size} × ${one.image_size} pixels`], ["Texts", `up to ${one.context_length} tokens`],
          ["Training data", one.data_fingerprint], ["Digest", one.digest], ...Object.entries(one.metrics).map(([name, value]) => [name, value.toFixed(4)]),
        ]),
      );
      if (one.card) $("cards").append(make("details", {}, make("summary", {}, "Model card"), make("pre", {}, one.card)));
    }
  }
  if (!about) return;
  const pairs = [["Made with", about.model], ["Items", about.items.toLocaleString("en")]];
  for (const name of ["images", "texts"]) {
    if (!about[name]) continue;
    const recall = about[name].recall.map((one) => `${one.at_10} by ${one.kind}`).join(", ") || "exact";
    pairs.push([name, `${about[name].vectors.toLocaleString("en")}, ${about[name].kind} ${about[name].codes}, recall@10: ${recall}`]);
  }
  $("cards").append(make("h3", {}, "Search index"), rows(pairs));
}

// ---- All of it

async function begin() {
  pictureInput("search", () => { $("search-clear").hidden = $("weight-label").hidden = false; if (location.hash.startsWith("#search/")) history.replaceState(null, "", "#search"); });
  pictureInput("classify", () => $("classify-form").requestSubmit());
  $("search-clear").addEventListener("click", clearPicture);
  $("search-form").addEventListener("submit", onSearch);
  $("classify-form").addEventListener("submit", onClassify);
  $("more").addEventListener("click", more);
  $("gallery").addEventListener("keydown", moveInGallery);
  setUpMap();
  addEventListener("hashchange", route);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName) && there("search")) {
      event.preventDefault();
      if ($("view-search").hidden) location.hash = "#search";
      setTimeout(() => $("words").focus());
    }
  });
  try {
    const { data } = await ask("v1/models");
    const endpoints = data.flatMap((model) => model.endpoints), searched = endpoints.includes("search");
    $("name").textContent = data.map((model) => model.id).join(", ");
    document.title = `mm: ${$("name").textContent}`;
    for (const [view, shown] of [["search", searched], ["map", searched], ["classify", endpoints.includes("classify")]]) document.querySelector(`nav a[data-view=${view}]`).hidden = !shown;
    const about = searched ? await ask("v1/search") : null;
    if (about) {
      for (const [name, kind] of Object.entries(about.fields)) { const option = make("option", { value: name }, name); option.dataset.kind = kind; $("filter-field").append(option); }
      if (!about.texts) $("target").querySelector("[value=texts]").remove();
    }
    for (const name of new Set(data.flatMap((model) => model.label_sets))) { $("label-set").append(make("option", { value: name }, name)); $("set-label").hidden = false; }
    showModels(data, about);
  } catch (error) { say(error.message, true); }
  route();
}

begin();
