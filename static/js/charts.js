// Draws the charts of the usage page: each canvas[data-chart] names the JSON that the server sent with it.
// Colours come from the stylesheet and are read anew when the theme changes.
(function () {
  const MAX_LABEL = 28;
  const NARROW = { width: 520, label: 15 };
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const number = new Intl.NumberFormat("en-US");
  const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
  const root = document.documentElement;

  // The browser computes what a custom property means here and now; a pixel says it in numbers, which Chart.js knows.
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  function colour(name) {
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    root.append(probe);
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = getComputedStyle(probe).color;
    pixel.fillRect(0, 0, 1, 1);
    probe.remove();
    const [red, green, blue, alpha] = pixel.getImageData(0, 0, 1, 1).data;
    return `rgba(${red}, ${green}, ${blue}, ${alpha / 255})`;
  }

  const shorten = (text, length = MAX_LABEL) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

  /** Every label in full in its tip, shortened at the axis and in the legend. */
  function datasets(data) {
    return data.series.map(({ label, values }, index) => {
      const hue = colour(data.tones[index] ? `--chart-${data.tones[index]}` : `--chart-${index + 1}`);
      return {
        label: shorten(label),
        data: values,
        backgroundColor: hue,
        hoverBackgroundColor: hue,
        borderColor: hue,
        pointBackgroundColor: hue,
        borderWidth: data.kind === "line" ? 2 : 0,
        pointRadius: values.filter((value) => value !== null).length > 60 ? 0 : 3, // a lone value is seen as a point only
        spanGaps: true,
        maxBarThickness: data.kind === "bars" ? 22 : 48,
        borderRadius: data.kind === "bars" ? 4 : 0,
        minBarLength: data.kind === "bars" ? 2 : 0,
      };
    });
  }

  function options(data) {
    const text = colour("--chart-text");
    const grid = colour("--chart-grid");
    const isLying = data.kind === "bars";
    const isStacked = data.kind === "stacked";
    const amounts = {
      beginAtZero: true,
      stacked: isStacked,
      border: { display: false },
      grid: { color: grid },
      ticks: { color: text, precision: 0, maxTicksLimit: 6, callback: (value) => compact.format(value) },
    };
    const names = {
      stacked: isStacked,
      border: { color: grid },
      grid: { display: false },
      ticks: {
        color: text,
        autoSkip: !isLying,
        maxRotation: 0,
        autoSkipPadding: 16,
        callback(value) {
          return shorten(this.getLabelForValue(value), this.chart.width < NARROW.width ? NARROW.label : MAX_LABEL);
        },
      },
    };
    return {
      animation: still.matches ? false : { duration: 300 },
      responsive: true,
      maintainAspectRatio: false,
      indexAxis: isLying ? "y" : "x",
      interaction: { mode: "index", intersect: false, axis: isLying ? "y" : "x" },
      scales: isLying ? { x: amounts, y: names } : { x: names, y: amounts },
      plugins: {
        legend: {
          display: data.series.length > 1,
          position: "bottom",
          labels: { color: text, boxWidth: 12, boxHeight: 12 },
        },
        tooltip: {
          callbacks: {
            title: (items) => data.labels[items[0].dataIndex],
            label: (item) => `${data.series[item.datasetIndex].label}: ${number.format(item.raw)}`,
          },
        },
      },
    };
  }

  // Says which theme is painted, and that it is.
  const painted = {
    id: "painted",
    afterRender: (chart) => {
      chart.canvas.dataset.painted = root.dataset.bsTheme;
    },
  };

  function draw(canvas) {
    if (!window.Chart || Chart.getChart(canvas)) return;
    const data = JSON.parse(document.getElementById(canvas.dataset.chart).textContent);
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    if (data.kind === "bars") canvas.parentElement.style.height = `${data.labels.length * 34 + 44}px`;
    new Chart(canvas, {
      type: data.kind === "line" ? "line" : "bar",
      data: { labels: data.labels, datasets: datasets(data) },
      options: options(data),
      plugins: [painted],
    });
  }

  const canvases = (scope) => scope.querySelectorAll?.("canvas[data-chart]") ?? [];

  function redraw() {
    canvases(document).forEach((canvas) => {
      window.Chart?.getChart(canvas)?.destroy();
      draw(canvas);
    });
  }

  canvases(document).forEach(draw);
  document.addEventListener("htmx:load", (event) => canvases(event.detail.elt).forEach(draw));
  document.addEventListener("htmx:beforeCleanupElement", (event) => {
    if (event.target.matches?.("canvas[data-chart]")) window.Chart?.getChart(event.target)?.destroy();
  });
  new MutationObserver(redraw).observe(root, { attributes: true, attributeFilter: ["data-bs-theme"] });
  still.addEventListener("change", redraw);
})();
