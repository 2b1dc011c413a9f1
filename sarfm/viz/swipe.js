// A scene on a map in metres, two pictures of it on either side of a divider, longitude and latitude under the mouse.
// The page's own script gives `state` (left, right, split …) and `image(layer)`, the picture of a layer as a data URI.
const at = (x, y) => L.latLng(y, x);  // CRS.Simple: latitude is y, longitude is x, in metres

// ---- the map: sea, land, graticule, two pictures ------------------------------------------------------------------------
const [xMin, yMin, xMax, yMax] = data.bounds;
const sceneBounds = L.latLngBounds(at(xMin, yMin), at(xMax, yMax));
const map = L.map("map", { crs: L.CRS.Simple, zoomSnap: 0.1, zoomDelta: 0.5, minZoom: -14, maxZoom: 4, attributionControl: false, wheelPxPerZoomLevel: 120 });
["left", "right", "lines", "tile"].forEach((name, i) => { map.createPane(name).style.zIndex = 450 + i; map.getPane(name).style.pointerEvents = "none"; });
map.fitBounds(sceneBounds, { paddingTopLeft: [66, 44], paddingBottomRight: [24, 44] });
const firstZoom = map.getZoom();
map.setMinZoom(Math.max(firstZoom - 7, Math.log2(map.getSize().x / 1.7e6))).setMaxZoom(firstZoom + 6);  // land is drawn 1200 km around
map.setMaxBounds(L.latLngBounds(at((xMin + xMax) / 2 - 1.1e6, (yMin + yMax) / 2 - 1.1e6), at((xMin + xMax) / 2 + 1.1e6, (yMin + yMax) / 2 + 1.1e6)));
L.control.scale({ imperial: false, maxWidth: 140 }).addTo(map);
const land = L.polygon(data.land.map((rings) => rings.map((ring) => ring.map(([x, y]) => at(x, y)))), { color: data.colours.coast, weight: 1, fillColor: data.colours.land, fillOpacity: 1, interactive: false });
function farOrNear() {  // a coast that is generalised by kilometres is shown from afar only; labels only from close by
  const world = data.land.length > 0 && 2 ** -map.getZoom() >= data.land_from_m;
  if (world) land.addTo(map); else land.remove();
  map.getContainer().classList.toggle("world", world);
  map.getContainer().classList.toggle("far", map.getZoom() < firstZoom - 1.6);
}
map.on("zoomend", farOrNear);
farOrNear();
if (data.locator) {
  const where = L.control({ position: "topright" });
  where.onAdd = () => { const i = L.DomUtil.create("img", "locator"); i.src = data.locator; i.alt = "where the scene is"; return i; };
  where.addTo(map);
}
for (const line of data.graticule) {
  L.polyline(line.path.map(([x, y]) => at(x, y)), { color: data.colours.lines, weight: 1, opacity: 0.55, interactive: false, pane: "lines" }).addTo(map);
  if (line.at) {
    const text = document.createElement("span");
    text.textContent = line.text;
    const iconAnchor = line.kind === "lat" ? [84, 8] : [40, -3];
    L.marker(at(...line.at), { icon: L.divIcon({ html: text, className: `degrees ${line.kind}`, iconSize: [80, 16], iconAnchor }), interactive: false, keyboard: false }).addTo(map);
  }
}
const pictures = {};
for (const side of ["left", "right"]) {
  pictures[side] = L.imageOverlay(image(state[side]), sceneBounds, { pane: side }).addTo(map);
}

// ---- the split: each pane is clipped at the divider ---------------------------------------------------------------------
function clip() {
  const size = map.getSize(), corner = map.containerPointToLayerPoint([0, 0]), end = map.containerPointToLayerPoint(size);
  const x = corner.x + size.x * state.split;
  map.getPane("left").style.clip = `rect(${corner.y}px, ${x}px, ${end.y}px, ${corner.x}px)`;
  map.getPane("right").style.clip = `rect(${corner.y}px, ${end.x}px, ${end.y}px, ${x}px)`;
  const px = size.x * state.split;
  byId("divider").style.left = `${px}px`;
  byId("divider").setAttribute("aria-valuenow", Math.round(100 * state.split));
  byId("left-name").style.right = `${size.x - px + 12}px`;
  byId("right-name").style.left = `${px + 12}px`;
}
function moveSplit(fraction) { state.split = Math.min(0.98, Math.max(0.02, fraction)); clip(); }
const divider = byId("divider");
divider.addEventListener("pointerdown", (e) => { divider.setPointerCapture(e.pointerId); e.preventDefault(); divider.focus(); });
divider.addEventListener("pointermove", (e) => {
  if (!divider.hasPointerCapture(e.pointerId)) return;
  const box = byId("stage").getBoundingClientRect();
  moveSplit((e.clientX - box.left) / box.width);
});
divider.addEventListener("keydown", (e) => {
  const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[e.key];
  if (step) { moveSplit(state.split + step); e.preventDefault(); }
});
map.on("move zoom zoomend resize viewreset", clip);

// ---- longitude and latitude under the mouse: directions interpolate across the pole and the date line ---------------------
const place = L.control({ position: "bottomright" });
place.onAdd = () => L.DomUtil.create("div", "place");
place.addTo(map);
function lonlat(x, y) {
  const g = data.lonlat;
  if (!g) return null;
  const u = (x - g.frame[0]) / (g.frame[2] - g.frame[0]) * (g.n - 1), v = (y - g.frame[1]) / (g.frame[3] - g.frame[1]) * (g.n - 1);
  const j = Math.floor(u), i = Math.floor(v);
  if (i < 0 || j < 0 || i >= g.n - 1 || j >= g.n - 1) return null;
  const mix = (k) => {
    const p = (r, c) => g.vectors[((i + r) * g.n + j + c) * 3 + k], a = u - j, b = v - i;
    return (1 - b) * ((1 - a) * p(0, 0) + a * p(0, 1)) + b * ((1 - a) * p(1, 0) + a * p(1, 1));
  };
  const [X, Y, Z] = [0, 1, 2].map(mix), degrees = 180 / Math.PI;
  return [Math.atan2(Y, X) * degrees, Math.atan2(Z, Math.hypot(X, Y)) * degrees];
}
map.on("mousemove", (e) => {
  const { lng: x, lat: y } = e.latlng, where = lonlat(x, y);
  const side = (value, names) => `${Math.abs(value).toFixed(5)}°${names[value >= 0 ? 1 : 0]}`;
  place.getContainer().textContent = where ? `${side(where[1], "SN")} ${side(where[0], "WE")}` : data.lonlat ? "" : `row ${Math.round(-y)}, column ${Math.round(x)}`;
});
