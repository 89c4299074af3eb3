// plotly's script, unpacked as soon as it has come and kept with the page's widget manager, where plot.js looks for it.

async function unpacked(gzipped) {
  const code = new Blob([gzipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const address = URL.createObjectURL(new Blob([await new Response(code).blob()], {type: "text/javascript"}));
  try {
    return await import(/* webpackIgnore: true */ address);
  } finally {
    URL.revokeObjectURL(address);
  }
}

export default {
  initialize({model}) {
    model.widget_manager.clipoPlotly = unpacked(model.get("gzipped"));
  },
};
