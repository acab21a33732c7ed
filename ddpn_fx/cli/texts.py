"""The texts of ``--help``."""

DESCRIPTION = """\
Turn a PyTorch module into an optimal-control problem and train it with
Differential Dynamic Programming.
"""
EPILOG = """\
examples:
  ddpn_fx demo                                        train on real digits and compare with SGD and Adam
  ddpn_fx chain my_models.py:make_net --input 8,784   show the stages of a model of yours
  ddpn_fx export my_models.py:make_net graphs --input 8,784
                                                      write the generated graphs as readable Python
  ddpn_fx explain my_models.py:make_net --input 8,784 what each pass did, where it was cut and why
  ddpn_fx diff graphs-before graphs-after             what differs between two exports
  ddpn_fx passes                                      what the compiler does, and what can be switched off
  ddpn_fx picture training.csv training.png           a recorded training, drawn

"ddpn_fx COMMAND --help" explains a command.
"""
DEMO_DESCRIPTION = """\
Train a small ReLU network on the 1,797 handwritten digits of scikit-learn, with
DDPNOpt, SGD and Adam over a grid of step sizes. Prints a table and writes
accuracy.png, results.json and the generated graphs. Takes a minute or two and no
network. Needs the extra packages of: pip install "ddpn-fx[demo]"
"""
DEMO_EPILOG = """\
examples:
  ddpn_fx demo                          the whole comparison, into ./demo-output
  ddpn_fx demo --quick                  a trial in seconds: one seed, few steps, nothing compiled
  ddpn_fx demo --out results --seeds 10   more trainings, into ./results
"""
FACTORY_HELP = """\
MODULE is a dotted name (my_package.models) or a path to a .py file. FACTORY is a
name in it: a function without arguments, an nn.Module class or an nn.Module. A
function may return the model alone, (model, example_inputs) or (model,
example_inputs, target); otherwise --input gives the shape, batch first, and the
values are drawn at random.
"""
CHAIN_DESCRIPTION = f"""\
Cut a model into the stages of a control problem and print them as a table: for each
stage its parameters (the control) and the activations that enter it (the state).

{FACTORY_HELP}"""
CHAIN_EPILOG = """\
examples:
  ddpn_fx chain my_models.py:make_net --input 8,784
  ddpn_fx chain torchvision.models:vgg11 --input 4,3,224,224
  ddpn_fx chain my_models.py:make_transformer --input 8,64 --dtype int64
  ddpn_fx chain my_models.py:net_and_inputs
"""
EXPORT_DESCRIPTION = f"""\
Take one training step of a model and write every graph that was generated for it into
DIR: readable, runnable Python, the table of the stages, and drawings.

{FACTORY_HELP}"""
EXPORT_EPILOG = """\
examples:
  ddpn_fx export my_models.py:make_net graphs --input 8,784
  ddpn_fx export my_models.py:make_net graphs --input 8,784 --target labels:10
  ddpn_fx export my_models.py:make_autoencoder graphs --input 8,784 --target 8,784 --loss mse
  ddpn_fx export my_models.py:make_net graphs --input 8,784 --format html passes model-explorer
"""
EXPLAIN_DESCRIPTION = f"""\
Take one training step of a model and say how it was captured, what each pass did and how
long it took, where the stages are cut and why, by which rules, what was compiled for
what, and what the fast path does not cover.

{FACTORY_HELP}"""
EXPLAIN_EPILOG = """\
examples:
  ddpn_fx explain my_models.py:make_net --input 8,784
  ddpn_fx explain my_models.py:make_net --input 8,784 --disable-pass fuse --disable-pass fold
  ddpn_fx explain my_models.py:make_autoencoder --input 8,784 --target 8,784 --loss mse
"""
DIFF_DESCRIPTION = """\
Compare two folders that "ddpn_fx export" wrote Python into: for each graph the operators
that came and went, and a unified difference of its lines.
"""
DIFF_EPILOG = """\
examples:
  ddpn_fx diff graphs-before graphs-after
  ddpn_fx diff graphs-before graphs-after --context 0
"""
PASSES_DESCRIPTION = """\
List the passes of the compiler in the order of a compilation, with what each does. An
optional one can be switched off: the result of a step stays, its graph or speed does
not. In Python: ddpn_fx.compile(model, passes={"fuse": False}).
"""
PASSES_EPILOG = """\
examples:
  ddpn_fx passes
  ddpn_fx explain my_models.py:make_net --input 8,784 --disable-pass fuse
"""
PICTURE_DESCRIPTION = """\
Draw a training that ddpn_fx.Recorder wrote into a CSV file: the loss, predicted and
actual decrease, and, where stages=True recorded them (CSV with .stages.csv in the place
of .csv), norms, y and the effective dimension of every stage. Needs matplotlib:
pip install "ddpn-fx[demo]"
"""
PICTURE_EPILOG = """\
examples:
  ddpn_fx picture training.csv training.png
"""
OF = {
    "demo": (DEMO_DESCRIPTION, DEMO_EPILOG),
    "chain": (CHAIN_DESCRIPTION, CHAIN_EPILOG),
    "export": (EXPORT_DESCRIPTION, EXPORT_EPILOG),
    "explain": (EXPLAIN_DESCRIPTION, EXPLAIN_EPILOG),
    "diff": (DIFF_DESCRIPTION, DIFF_EPILOG),
    "passes": (PASSES_DESCRIPTION, PASSES_EPILOG),
    "picture": (PICTURE_DESCRIPTION, PICTURE_EPILOG),
}
