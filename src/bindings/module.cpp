// vattn._core: the extension module. One file a topic binds its part; none holds logic.
//
// Every call that can reach a driver, or wait for a lock that is held over driver calls, releases the GIL.
#include "bindings/bindings.hpp"
#include "vattn/version.hpp"

// What NB_MODULE defines under Python's name for it: the function below asks first.
#define PyInit__core init_in_main_interpreter
NB_MODULE(_core, module) {
  module.doc() = "The native part of vattn. Use the classes of the package itself.";
  // At interpreter exit tensors may outlive their modules; that is no leak worth a warning to a user.
  nb::set_leak_warnings(false);
  module.def("version", &vattn::version, "The version of the library that is loaded.");
  bind_errors(module);
  bind_system(module);
  bind_tensors(module);
  bind_page_pool(module);
  bind_kv_cache(module);
  bind_growable_tensor(module);
}
#undef PyInit__core

/// ImportError in a subinterpreter, before nanobind sees it: registering a second interpreter's classes would take those of the
/// main one from it. Python refuses by itself from 3.12 on. The main interpreter's number is 0.
extern "C" NB_EXPORT PyObject* PyInit__core(void) {
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0) return init_in_main_interpreter();
  PyErr_SetString(PyExc_ImportError,
                  "vattn does not support loading in subinterpreters: import it in the main interpreter of the process");
  return nullptr;
}
