"""What trains. One file each; a file defines

Options                  the method's keys in a recipe, with `kind`
GIVES                    the kind of bundle that training leaves
check(options, plan)     raises RecipeError where it would train nothing of the plan's model
storage(options)         how the weights are kept in memory: a key of tuner.checkpoint.COMPUTE
prepare(model, ..., fresh)      the model with everything else frozen
layers(model)            the trained modules by name: each must get a gradient
reopen(bundle)           the model as it was trained, from what was saved
save(model, folder)      writes what was trained
serving(options, architecture)
                         facts for an engine
"""
