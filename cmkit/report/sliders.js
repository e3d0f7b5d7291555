
// The sliders: stored pictures, mixed pixel by pixel at the scales between them.
const STOPS = 100;
const GAP_GREY = 64;
const STAMP = ["smoke run:", "meaningless"];

/** Pictures as planes of bytes, image after image, from the tiles of one sprite. */
async function unpack(stored) {
  const sprite = new Image();
  sprite.src = stored.sprite;
  await sprite.decode();
  const sheet = new OffscreenCanvas(sprite.naturalWidth, sprite.naturalHeight);
  const context = sheet.getContext("2d", { willReadFrequently: true });
  context.drawImage(sprite, 0, 0);
  const { side, images, across, channels } = stored;
  const total = stored.pictures * images;
  const size = images * side * side * channels;
  const pictures = Array.from({ length: stored.pictures }, () => new Uint8Array(size));
  for (let row = 0; row * across < total; row++) {
    const pixels = context.getImageData(0, row * side, sheet.width, side).data;
    for (let column = 0; column < across; column++) {
      const tile = row * across + column;
      if (tile >= total) break;
      let place = (tile % images) * side * side * channels;
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          const from = 4 * (y * sheet.width + column * side + x);
          for (let c = 0; c < channels; c++) {
            pictures[Math.floor(tile / images)][place++] = pixels[from + c];
          }
        }
      }
    }
  }
  return pictures;
}

/** [place, weight] of the values that a cubic through the four nearest takes at s. */
function cubic(values, s) {
  const exact = values.indexOf(s);
  if (exact >= 0) return [[exact, 1]];
  const above = values.findIndex((value) => value > s);
  const first = Math.max(0, Math.min(above - 2, values.length - 4));
  const own = values.slice(first, first + 4);
  return own.map((value, k) => {
    const factors = own.map((other, j) => (j === k ? 1 : (s - other) / (value - other)));
    return [first + k, factors.reduce((a, b) => a * b)];
  });
}

/** [picture, weight] of the cells around a place: the product over the axes. */
function cellWeights(model, at) {
  let found = [[0, 1]];
  model.axes.forEach(({ values }, axis) => {
    const own = cubic(values, at[axis]);
    found = found.flatMap(([place, weight]) =>
      own.map(([k, factor]) => [place * values.length + k, weight * factor]),
    );
  });
  return found.map(([place, weight]) => [model.nodes[place], weight]);
}

/** [picture, weight] of the nodes of a polynomial: products of Chebyshev polynomials @ matrix. */
function nodeWeights(model, at) {
  const node = model.nodes.find(([, ...values]) => values.every((v, k) => v === at[k]));
  if (node) return [[node[0], 1]];
  const angles = at.map((s, k) => {
    const x = (2 * s - model.low[k] - model.high[k]) / (model.high[k] - model.low[k]);
    return Math.acos(Math.max(-1, Math.min(1, x)));
  });
  const weights = new Float64Array(model.matrix[0].length);
  model.matrix.forEach((row, term) => {
    const degrees = model.exponents[term];
    const factor = degrees.reduce((product, n, k) => product * Math.cos(n * angles[k]), 1);
    row.forEach((value, k) => (weights[k] += factor * value));
  });
  return Array.from(weights, (weight, k) => [k, weight]);
}

/** The sum of pictures by their weights, written to `sum`, four pictures at a time. */
function mix(pictures, weights, sum) {
  sum.fill(0);
  const used = weights.filter(([, weight]) => weight !== 0);
  for (let k = 0; k < used.length; k += 4) {
    const [[a, u], [b, v], [c, w], [d, z]] = [0, 1, 2, 3].map((j) => used[k + j] ?? [used[k][0], 0]);
    add(sum, pictures[a], pictures[b], pictures[c], pictures[d], u, v, w, z);
  }
}

function add(sum, a, b, c, d, u, v, w, z) {
  const size = sum.length;
  for (let i = 0; i < size; i++) sum[i] += u * a[i] + v * b[i] + w * c[i] + z * d[i];
}

/** A function that draws images, given as planes of numbers, in the layout of the cells' pictures. */
function painter(stored, canvas) {
  const { side, images, columns, factor, gap, channels } = stored;
  const step = factor * side + gap;
  canvas.width = Math.min(columns, images) * step - gap;
  canvas.height = Math.ceil(images / columns) * step - gap;
  canvas.classList.toggle("tiny", factor > 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const frame = context.createImageData(canvas.width, canvas.height);
  const source = new Int32Array(canvas.width * canvas.height).fill(-1);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const image = Math.floor(y / step) * columns + Math.floor(x / step);
      const [inX, inY] = [x % step, y % step].map((n) => Math.floor(n / factor));
      if (image < images && inX < side && inY < side) {
        source[y * canvas.width + x] = ((image * side + inY) * side + inX) * channels;
      }
    }
  }
  const [green, blue] = channels === 1 ? [0, 0] : [1, 2];
  for (let k = 0; k < frame.data.length; k++) frame.data[k] = k % 4 === 3 ? 255 : GAP_GREY;
  return (sum) => {
    const pixels = frame.data; // it rounds, and cuts to 0 to 255
    for (let k = 0; k < source.length; k++) {
      const from = source[k];
      if (from < 0) continue;
      pixels[4 * k] = sum[from];
      pixels[4 * k + 1] = sum[from + green];
      pixels[4 * k + 2] = sum[from + blue];
    }
    context.putImageData(frame, 0, 0);
    if (stored.smoke) stamp(context, canvas.width, canvas.height);
  };
}

function stamp(context, width, height) {
  context.font = "bold 100px sans-serif";
  const wide = Math.max(...STAMP.map((line) => context.measureText(line).width)) / 100;
  const size = Math.min((0.9 * width) / wide, 0.35 * height);
  context.font = `bold ${size}px sans-serif`;
  Object.assign(context, { textAlign: "center", textBaseline: "middle", lineJoin: "round" });
  Object.assign(context, { lineWidth: size / 8, strokeStyle: "black", fillStyle: "white" });
  STAMP.forEach((line, k) => {
    const y = height / 2 + (k - 0.5) * size;
    context.strokeText(line, width / 2, y);
    context.fillText(line, width / 2, y);
  });
}

/** Where a slider stops: evenly, and at each value of the cells instead of what is next to it. */
function stopsOf(values) {
  const [low, high] = [values[0], values[values.length - 1]];
  const even = Array.from({ length: STOPS + 1 }, (_, k) => low + ((high - low) * k) / STOPS);
  const apart = (stop) => values.every((v) => Math.abs(v - stop) > (high - low) / (2 * STOPS));
  return [...even.filter(apart), ...values].sort((a, b) => a - b);
}

const closest = (stops, value) =>
  stops.reduce((best, s, k) => (Math.abs(s - value) < Math.abs(stops[best] - value) ? k : best), 0);
const written = (value) => String(Number(value.toPrecision(3)));

async function startSliders(stored) {
  const pictures = await unpack(stored);
  const paint = painter(stored, find("live-canvas"));
  const sum = new Float32Array(pictures[0].length);
  const sliders = [...document.querySelectorAll("#live .slider")].map((box) => ({
    box,
    label: box.querySelector("label"),
    select: box.querySelector("select"),
    output: box.querySelector("output"),
    input: box.querySelector("input"),
    ticks: box.querySelector("datalist"),
    axis: 0,
    stops: [],
  }));
  let model, at, drawing;

  function nearest() {
    const scale = model.axes.map(({ values }) => values[values.length - 1] - values[0]);
    const far = ([, ...values]) =>
      values.reduce((total, v, k) => total + ((v - at[k]) / scale[k]) ** 2, 0);
    return model.cells.reduce((best, cell) => (far(cell) < far(best) ? cell : best));
  }

  function draw() {
    drawing = 0;
    const weights = (model.matrix ? nodeWeights : cellWeights)(model, at);
    mix(pictures, weights, sum);
    paint(sum);
    const place = model.axes.map(({ name }, k) => `${name} ${written(at[k])}`).join(", ");
    const state = weights.length === 1 ? "as drawn by the model" : "interpolated";
    find("live-place").textContent = place;
    find("live-state").textContent = state;
    find("live-canvas").setAttribute("aria-label", `samples at ${place}, ${state}`);
    const [cell] = nearest();
    const told = data.cells[cell];
    const minimize = document.querySelector(".inspect .score").firstChild.textContent.trim();
    find("live-near").textContent = `${told.label}, ${minimize} ${told.score}`;
    const rows = table.tBodies[0].rows;
    const line = stored.models.length > 1 ? rows[model.line] : table;
    const button = line.querySelector(`[data-cell="${cell}"]`);
    if (button && button.getAttribute("aria-pressed") !== "true") choose(button);
  }

  function refresh() {
    for (const slider of sliders) {
      const value = at[slider.axis];
      slider.input.value = closest(slider.stops, value);
      slider.input.setAttribute("aria-valuetext", written(value));
      slider.output.textContent = written(value);
    }
    drawing ||= requestAnimationFrame(draw);
  }

  function goToPlace(values) {
    at = [...values];
    refresh();
  }

  function turn(slider, axis) {
    slider.axis = axis;
    const { label, values } = model.axes[axis];
    slider.stops = stopsOf(values);
    slider.input.max = slider.stops.length - 1;
    slider.label.textContent = label;
    slider.select.value = axis;
    const places = values.map((value) => new Option("", slider.stops.indexOf(value)));
    slider.ticks.replaceChildren(...(values.length <= 30 ? places : []));
  }

  function take(next) {
    model = next;
    at = [...model.start];
    sliders.forEach((slider, k) => {
      slider.box.hidden = k >= model.axes.length;
      slider.select.replaceChildren(...model.axes.map(({ label }, axis) => new Option(label, axis)));
      slider.select.hidden = model.axes.length <= sliders.length;
      slider.label.classList.toggle("unseen", !slider.select.hidden);
      turn(slider, Math.min(k, model.axes.length - 1));
    });
    find("live-model").value = model.line;
    find("live-plain").hidden = !model.plain;
    find("live-best").hidden = !model.best;
    refresh();
  }

  for (const slider of sliders) {
    slider.input.addEventListener("input", () => {
      at[slider.axis] = slider.stops[slider.input.value];
      refresh();
    });
    slider.input.addEventListener("keydown", (event) => {
      const { values } = model.axes[slider.axis];
      const now = at[slider.axis];
      const next = {
        PageUp: () => values.find((value) => value > now),
        PageDown: () => values.findLast((value) => value < now),
      }[event.key]?.();
      if (!event.key.startsWith("Page")) return;
      event.preventDefault();
      at[slider.axis] = next ?? now;
      refresh();
    });
    slider.select.addEventListener("change", () => {
      const [old, axis] = [slider.axis, Number(slider.select.value)];
      const other = sliders.find((one) => one !== slider && one.axis === axis);
      if (other) turn(other, old);
      else at[old] = model.start[old];
      turn(slider, axis);
      refresh();
    });
  }
  find("live-plain").addEventListener("click", () => goToPlace(model.plain));
  find("live-best").addEventListener("click", () => goToPlace(model.best));
  find("live-model").replaceChildren(...stored.models.map(({ label, line }) => new Option(label, line)));
  find("live-line").hidden = stored.models.length === 1;
  const ofLine = (line) => stored.models.find((one) => one.line === Number(line));
  find("live-model").addEventListener("change", () => take(ofLine(find("live-model").value)));
  table.addEventListener("cell", ({ detail: button }) => {
    const next = stored.models.length > 1 ? ofLine(button.closest("tr").sectionRowIndex) : model;
    if (next && next !== model) take(next);
    const cell = model.cells.find(([index]) => index === Number(button.dataset.cell));
    if (cell) goToPlace(cell.slice(1));
  });
  find("live").hidden = false;
  take(stored.models.find(({ best }) => best) ?? stored.models[0]);
}

if (data.sliders) startSliders(data.sliders);
