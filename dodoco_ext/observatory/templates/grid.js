(() => {
  const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const model = document.getElementById("model"), condition = document.getElementById("condition"), metric = document.getElementById("metric");
  const tip = document.getElementById("tip");

  const showModel = () => {
    for (const part of $("[data-model]")) part.hidden = part.dataset.model !== model.value && !(part.hasAttribute("data-any") && model.value === "");
    // Sections of one model show the first one while all are chosen.
    if (model.value === "") for (const group of $("[data-group]")) {
      const parts = $(":scope > [data-model]", group);
      parts.forEach((part, index) => { part.hidden = index > 0; });
    }
  };
  const showCondition = () => {
    const place = condition.value;
    for (const svg of $("svg.panel")) {
      svg.classList.toggle("picked", place !== "");
      for (const part of $(".line, .mark, .random", svg)) part.classList.toggle("lit", part.classList.contains("s" + (place === "" && part.classList.contains("random") ? condition.dataset.first : place)));
    }
  };
  const showMetric = () => { for (const table of $("[data-metric]")) table.hidden = table.dataset.metric !== metric.value; };
  model.addEventListener("change", showModel);
  condition.addEventListener("change", showCondition);
  metric.addEventListener("change", showMetric);
  for (const control of $(".needs-script")) control.hidden = false;
  showModel(); showCondition(); showMetric();

  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 6)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18) + "px";
  };
  const hush = () => { tip.hidden = true; };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, event => {
    const target = event.target.closest?.("[data-tip]");
    if (target) say(target.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest?.(".maps img")) hush();
  });
  document.addEventListener("focusin", event => {
    const box = event.target.dataset?.tip && event.target.getBoundingClientRect();
    if (box) say(event.target.dataset.tip, box.left, box.bottom); else hush();
  });

  // Bands: the rule of bands.py, at edges of the reader's choice.
  const low = document.getElementById("edge-low"), high = document.getElementById("edge-high");
  const showEdges = () => {
    const edges = [Number(low.value), Math.max(Number(high.value), Number(low.value) + 0.005)];
    document.getElementById("edges").textContent = edges.map(edge => edge.toFixed(3)).join(" and ");
    for (const cell of $("[data-lowest]")) {
      const value = Number(cell.dataset.lowest);
      cell.textContent = value <= edges[0] ? "data-resilient" : value > edges[1] ? "persistently concentrated" : "intermediate";
    }
    for (const svg of $("svg.rows[aria-label=Bands]")) {
      const at = svg.dataset, span = Number(at.right) - Number(at.left);
      $("path.level.edge", svg).forEach((path, index) => {
        const x = Number(at.left) + span * (edges[index] - Number(at.low)) / (Number(at.high) - Number(at.low));
        path.setAttribute("transform", `translate(${(x - Number(path.getAttribute("d").match(/M([\d.]+)/)[1])).toFixed(1)} 0)`);
      });
    }
  };
  if (low && high) for (const slider of [low, high]) slider.addEventListener("input", showEdges);

  const data = JSON.parse(document.getElementById("data").textContent), byId = document.getElementById("by-id");
  byId.addEventListener("change", () => { for (const image of $(".maps img")) image.hidden = (image.dataset.sorted === "1") === byId.checked; });
  for (const image of $(".maps img")) {
    const layers = data.counts[image.dataset.cell], order = data.order[image.dataset.of];
    image.addEventListener("pointerleave", hush);
    for (const kind of ["pointermove", "pointerdown"]) image.addEventListener(kind, event => {
      const box = image.getBoundingClientRect();
      const row = Math.min(layers.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * layers.length)));
      const counts = layers[row], column = Math.min(counts.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * counts.length)));
      const expert = image.dataset.sorted === "1" ? order[row][column] : column, total = counts.reduce((a, b) => a + b, 0);
      say(`layer ${row}, expert ${expert}: ${counts[expert].toLocaleString("en")} assignments, ${(counts[expert] * counts.length / Math.max(total, 1)).toFixed(2)} times uniform`, event.clientX, event.clientY);
    });
  }
})();
