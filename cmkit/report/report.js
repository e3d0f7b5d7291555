"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

// The heatmap: one cell is chosen; clicks and arrow keys choose another.
const table = find("heat");

function choose(button) {
  for (const other of table.querySelectorAll("button")) {
    const chosen = other === button;
    other.tabIndex = chosen ? 0 : -1;
    other.setAttribute("aria-pressed", String(chosen));
  }
  const cell = data.cells[Number(button.dataset.cell)];
  find("cell-label").textContent = cell.label;
  find("cell-score").textContent = cell.score;
  find("cell-note").textContent = cell.note;
  const image = find("cell-image");
  image.hidden = !cell.src;
  find("cell-gone").hidden = Boolean(cell.src);
  if (cell.src) {
    image.src = cell.src;
    image.alt = "samples at " + cell.label;
  }
}

function goTo(button) {
  choose(button);
  table.dispatchEvent(new CustomEvent("cell", { detail: button }));
}

function neighbour(button, key) {
  const cell = button.closest("td");
  const row = cell.parentElement;
  const buttons = row.querySelectorAll("button");
  if (key === "Home") return buttons[0];
  if (key === "End") return buttons[buttons.length - 1];
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!moves[key]) return null;
  const [x, y] = moves[key];
  const other = table.rows[row.rowIndex + y]?.cells[cell.cellIndex + x];
  return other?.querySelector("button") ?? button;
}

table?.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) goTo(button);
});
table?.addEventListener("keydown", (event) => {
  const button = event.target.closest("button");
  const next = button && neighbour(button, event.key);
  if (!next) return;
  event.preventDefault();
  goTo(next);
  next.focus();
});

// Before and after: side by side, or one over the other with a slider.
const pair = find("pair");

pair?.addEventListener("input", () => {
  const over = find("view-over").checked;
  pair.classList.toggle("over", over);
  find("cut").hidden = !over;
  pair.style.setProperty("--cut", find("cut").value + "%");
});
find("views")?.removeAttribute("hidden");

// Pictures drawn while training: the slider goes from step to step.
const shown = find("shown-at");

function showStep() {
  const { label, sources } = data.shown[Number(shown.value)];
  find("shown-step").textContent = label;
  shown.setAttribute("aria-valuetext", label);
  find("shown").querySelectorAll("img").forEach((image, k) => {
    image.src = sources[k];
  });
}

shown?.addEventListener("input", showStep);
if (shown) {
  shown.hidden = false;
  showStep();
}

// The loss curve says what is under the pointer.
const plot = find("loss");

plot?.addEventListener("pointermove", (event) => {
  const box = plot.getBoundingClientRect();
  const points = data.points;
  const x = (100 * (event.clientX - box.left)) / box.width;
  let near = points.findIndex((point) => point[0] >= x);
  if (near < 0) near = points.length - 1;
  find("loss-here").textContent = data.curve[near];
  const dot = find("loss-dot");
  dot.setAttribute("cx", points[near][0] + "%");
  dot.setAttribute("cy", points[near][1] + "%");
  dot.removeAttribute("hidden");
});

// Copying works from a file too, where the clipboard may be refused.
find("copy")?.addEventListener("click", async (event) => {
  const text = find("recipe");
  try {
    await navigator.clipboard.writeText(text.textContent);
    event.target.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    event.target.textContent = "Selected: press Ctrl+C";
  }
});
find("copy")?.removeAttribute("hidden");
