"use strict";
// tooltips with the values at the pointer
const number = value => Number(value.toPrecision(4)).toLocaleString("en", {maximumFractionDigits: 9});
for (const svg of document.querySelectorAll(".chart")) {
  const {x: [low, high, left, right], label, series} = JSON.parse(svg.dataset.chart);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  const nearest = (points, x) => points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best);
  const shown = series.filter(([, points]) => points.length);
  svg.addEventListener("pointermove", event => {
    if (!shown.length) return;
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = low + ((event.clientX - box.left) * scale - left) / (right - left) * (high - low);
    const found = shown.map(([name, points], i) => [name, nearest(points, at), i]);
    const x = nearest(found.map(([, p]) => p), at)[0], pixel = left + (x - low) / (high - low) * (right - left);
    cursor.setAttribute("d", `M${pixel},8V${svg.viewBox.baseVal.height - 32}`);
    svg.append(cursor);
    tip.replaceChildren(`${label} ${number(x)}`, ...found.map(([name, p]) => {
      const line = document.createElement("span");
      line.textContent = `${name} ${number(p[1])}`.trim();
      return line;
    }));
    svg.parentNode.append(tip);
    const place = pixel / scale;
    tip.style.left = place < box.width / 2 ? `${place + 10}px` : "auto";
    tip.style.right = place < box.width / 2 ? "auto" : `${box.width - place + 10}px`;
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); tip.remove(); });
}

// a video is a grid of clips; canvases show its parts, laid out to fit the page
for (const player of document.querySelectorAll(".player")) {
  const videos = [...player.querySelectorAll("video")], cells = player.querySelector(".cells");
  const button = player.querySelector("button"), slider = player.querySelector("input"), output = player.querySelector("output");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const start = video => video.play().catch(() => { button.textContent = "Play"; });
  let current = videos[videos.length - 1];
  const draw = () => {
    const {videoWidth: w, videoHeight: h} = current;
    if (w && current.readyState > 1) {
      // reconstructions are pairs of squares, one pair per row; samples are eight columns
      const pairs = player.dataset.kind === "reconstruction";
      const width = pairs ? w : Math.floor(w / 8), height = pairs ? Math.floor(w / 2) : h;
      const count = pairs ? Math.max(1, Math.floor(h / height)) : 8;
      while (cells.children.length < count) cells.append(document.createElement("canvas"));
      [...cells.children].forEach((canvas, i) => {
        if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
        const [x, y] = pairs ? [0, i * height] : [i * width, 0];
        canvas.getContext("2d").drawImage(current, x, y, width, height, 0, 0, width, height);
      });
    }
    requestAnimationFrame(draw);
  };
  player.classList.add("tiled");
  videos.forEach(video => { video.hidden = false; video.autoplay = false; video.controls = false; video.pause(); });
  if (calm) button.textContent = "Play"; else start(current);
  button.addEventListener("click", () => {
    if (current.paused) { button.textContent = "Pause"; start(current); }
    else { button.textContent = "Play"; current.pause(); }
  });
  slider?.addEventListener("input", () => {
    const playing = !current.paused, time = current.currentTime;
    current.pause();
    current = videos[slider.value];
    current.currentTime = time;
    if (playing) start(current);
    output.textContent = `step ${current.dataset.step}`;
  });
  draw();
}
