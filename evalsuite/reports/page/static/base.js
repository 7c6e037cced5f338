// What the other scripts share: the data, small makers of elements, and the theme. Text from the data only ever becomes
// text nodes and attribute values.

// The table library writes these through innerHTML. Where the browser enforces trusted types, nothing else can be.
const MARKUP = new Set(["", "&nbsp;", "<div class='tabulator-arrow'></div>"]);
if (window.trustedTypes) {
  trustedTypes.createPolicy("default", {
    createHTML: (text) => (MARKUP.has(text) ? text : text.replaceAll("&", "&amp;").replaceAll("<", "&lt;")),
  });
}

const data = JSON.parse(document.getElementById("data").textContent);

function $(id) {
  return document.getElementById(id);
}

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const whole = new Intl.NumberFormat("en");

function lengthLabel(tokens) {
  for (const [unit, size] of [
    ["M", 1 << 20],
    ["K", 1 << 10],
  ]) {
    if (tokens >= size && (tokens * 2) % size === 0) return `${tokens / size}${unit}`;
  }
  return tokens ? String(tokens) : "";
}

function percent(value) {
  return value === null ? "–" : value.toFixed(1);
}

// "97.0 (91.5 to 99.0), 100 samples" for a tip or a title.
function spelled(cell) {
  const share = data.sets[cell.set].share;
  const show = (value) => (value === null ? "?" : share ? value.toFixed(1) : String(value));
  const failed = cell.errors ? `, ${cell.errors} failed` : "";
  const partial = cell.n < cell.asked ? `, partial: ${whole.format(cell.asked)} asked` : "";
  return `${show(cell.mean)}${share ? " %" : ""} (${show(cell.low)} to ${show(cell.high)}), ${whole.format(cell.n)} samples${failed}${partial}`;
}

function modelLabel(place) {
  const model = data.models[place];
  return `${model.name} (${model.family})`;
}

function setUpTheme() {
  const themes = ["system", "light", "dark"];
  const button = $("theme");
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  let stored = null;
  try {
    stored = localStorage.getItem("gdn2-eval-theme");
  } catch {
    // A browser may keep nothing for files.
  }
  set(themes.includes(stored) ? stored : "system");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    set(next);
    try {
      localStorage.setItem("gdn2-eval-theme", next);
    } catch {
      // The choice then lasts as long as the page.
    }
  });
}

function setUpNotices() {
  for (const [name, text] of data.notices) {
    $("notices").append(el("h3", {}, name), el("pre", {}, text));
  }
}

setUpTheme();
setUpNotices();
