# GPTX_CUDA = AUTO | ON | OFF. Says whether libgptx_cuda is built, and why not; builds it.

if(NOT GPTX_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GPTX_CUDA: expected AUTO, ON or OFF, got '${GPTX_CUDA}'")
endif()

# The same bits in every kernel: multiply-adds are fused where the source says so and nowhere else.
set(GPTX_NVCC_OPTIONS --expt-relaxed-constexpr -fmad=false -lineinfo --compress-mode=size
  # A kernel that spills registers is a mistake on every architecture.
  -Xptxas=-warn-spills,-warn-lmem-usage)

# Sets GPTX_CUDA_FOUND, and GPTX_CUDA_BUILD to what this build has or lacks.
function(gptx_find_cuda)
  set(found OFF)
  include(CheckLanguage)
  if(GPTX_CUDA STREQUAL "OFF")
    set(why "without CUDA: GPTX_CUDA=OFF")
  else()
    # Neither this nor a failed probe ends the configuration, as enable_language(CUDA) would.
    check_language(CUDA)
    find_program(GPTX_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(CMAKE_CUDA_COMPILER)
      set(nvcc "${CMAKE_CUDA_COMPILER}")
    else()
      set(nvcc "${GPTX_NVCC}")
    endif()
    if(NOT nvcc)
      set(why "without CUDA: nvcc was not found in PATH, CUDACXX, CUDA_HOME or /usr/local/cuda")
    else()
      set(probe "${CMAKE_BINARY_DIR}/cuda_probe")
      file(WRITE "${probe}/probe.cu" "__global__ void kernel(int* p) { *p = 1; }\nint main() { return 0; }\n")
      set(codes ${GPTX_CUDA_ARCHS})
      list(TRANSFORM codes REPLACE "(.+)" "-gencode=arch=compute_\\1,code=sm_\\1")
      execute_process(
        COMMAND "${nvcc}" -std=c++20 -ccbin "${CMAKE_CXX_COMPILER}" -cudart static ${codes} ${GPTX_NVCC_OPTIONS}
                -o "${probe}/probe" "${probe}/probe.cu"
        RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
      if(status EQUAL 0)
        set(found ON)
        list(JOIN GPTX_CUDA_ARCHS " " archs)
        set(why "with CUDA for compute capabilities ${archs}")
        set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "CUDA compiler" FORCE)
      else()
        string(REGEX REPLACE "[\r\n\"\\\\;]+" " " output "${output}")
        string(SUBSTRING "${output}" 0 200 output)
        list(JOIN GPTX_CUDA_ARCHS " " archs)
        set(why "without CUDA: ${nvcc} with ${CMAKE_CXX_COMPILER} does not compile for ${archs}: ${output}")
      endif()
    endif()
  endif()
  if(GPTX_CUDA STREQUAL "ON" AND NOT found)
    message(FATAL_ERROR "GPTX_CUDA=ON, but gptx would be built ${why}")
  endif()
  message(STATUS "gptx: ${why} (GPTX_CUDA=${GPTX_CUDA})")
  set(GPTX_CUDA_FOUND ${found} PARENT_SCOPE)
  set(GPTX_CUDA_BUILD "${why}" PARENT_SCOPE)
endfunction()

gptx_find_cuda()
if(GPTX_CUDA_FOUND)
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
endif()

# The sources of libgptx_cuda but for the device itself, which the tests replace.
set(GPTX_CUDA_SOURCES
  csrc/cuda/cuda_backend.cu
  csrc/cuda/kernels/bfloat16.cu
  csrc/cuda/kernels/float32.cu
  csrc/cuda/kernels/int8.cu
  csrc/cuda/kernels/int8_fast.cu
  csrc/cuda/matrix.cu
  csrc/cuda/step_tables.cu
  csrc/cuda/warpgroups_agree.cu
  csrc/model/cuda_model.cu)
list(TRANSFORM GPTX_CUDA_SOURCES PREPEND "${PROJECT_SOURCE_DIR}/")

function(gptx_cuda_library)
  add_library(gptx_cuda MODULE ${GPTX_CUDA_SOURCES} csrc/cuda/device.cu csrc/cuda/probe.cu)
  # Machine code for each, and PTX, which a driver compiles for newer ones, of those that let kernels overlap.
  set(codes)
  # 9.0 with what it alone has (wgmma): no other 9.x exists.
  foreach(arch IN LISTS GPTX_CUDA_ARCHS)
    if(arch EQUAL 90)
      list(APPEND codes 90a-real)
    else()
      list(APPEND codes ${arch}-real)
    endif()
    if(arch GREATER_EQUAL 90)
      list(APPEND codes ${arch}-virtual)
    endif()
  endforeach()
  list(JOIN GPTX_CUDA_ARCHS " " archs)
  set_target_properties(gptx_cuda PROPERTIES
    CUDA_ARCHITECTURES "${codes}"
    CUDA_STANDARD 20
    CUDA_STANDARD_REQUIRED ON
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(gptx_cuda PRIVATE csrc)
  target_compile_options(gptx_cuda PRIVATE ${GPTX_NVCC_OPTIONS} -Xcompiler=-ffp-contract=off,-Wall
    $<$<BOOL:${GPTX_WERROR}>:-Werror=all-warnings>)
  target_compile_definitions(gptx_cuda PRIVATE
    GPTX_VERSION="${PROJECT_VERSION}" GPTX_CUDA_ARCHITECTURES="${archs}")
  set(exports "${PROJECT_SOURCE_DIR}/csrc/cuda/exports.map")
  target_link_options(gptx_cuda PRIVATE -Wl,--version-script=${exports} -Wl,-z,now -Wl,-z,defs)
  set_property(TARGET gptx_cuda APPEND PROPERTY LINK_DEPENDS "${exports}")
  install(TARGETS gptx_cuda LIBRARY DESTINATION gptx/_lib)
endfunction()
