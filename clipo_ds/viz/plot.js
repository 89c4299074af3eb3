// A plotly figure that gets plotly's script from the one widget that has it, `_script`.
//
// plotly's own FigureWidget brings 5 MB with every figure. A page with six of them, loaded anew, needs longer to parse
// those than anywidget waits (2 s), and shows "model not found" instead. So the script is loaded once a page, and
// `initialize` does not wait for it; what Python says meanwhile is drawn when its whole state comes, moments later.

const CHANGES = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
                 "removeLayoutProps", "removeTraceProps"].map(name => `change:_py2js_${name}`);

async function load(model) {
  const id = model.get("_script").replace("IPY_MODEL_", ""), manager = model.widget_manager;
  while (!manager.has_model(id)) await new Promise(resolve => setTimeout(resolve, 50));  // models come in any order
  const script = await manager.get_model(id);
  script.plotly ??= unpacked(script.get("gzipped"));
  return script.plotly;
}

async function unpacked(gzipped) {
  const code = new Blob([gzipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const address = URL.createObjectURL(new Blob([await new Response(code).blob()], {type: "text/javascript"}));
  try {
    return await import(/* webpackIgnore: true */ address);
  } finally {
    URL.revokeObjectURL(address);
  }
}

export default () => {
  let figure, loaded, missed = false;
  return {
    initialize({model}) {
      const miss = () => { missed = true; };
      CHANGES.forEach(change => model.on(change, miss));
      loaded = load(model).then(plotly => {
        CHANGES.forEach(change => model.off(change, miss));
        figure = plotly.default();
        figure.initialize({model});
      });
    },
    async render({model, el}) {
      await loaded;
      let remove = figure.render({model, el});
      const again = () => {
        model.off("change:_widget_data", again);
        remove();
        el.replaceChildren();
        remove = figure.render({model, el});
      };
      if (missed) model.on("change:_widget_data", again);
      return () => remove();
    },
  };
};
