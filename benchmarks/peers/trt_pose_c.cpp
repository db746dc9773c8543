// trt_pose's parser for one image, on raw pointers instead of torch tensors.
#include <algorithm>
#include <vector>

#include "parse/connect_parts.hpp"
#include "parse/find_peaks.hpp"
#include "parse/munkres.hpp"
#include "parse/paf_score_graph.hpp"
#include "parse/refine_peaks.hpp"

using namespace trt_pose::parse;

// out [most, C, 3]: x and y over the map's size with cell centres at .5, and the map's value; returns how many objects.
extern "C" int trt_parse(const float *cmap, const float *paf, const int *topology, int C, int K, int H, int W, float cmap_threshold,
                         float link_threshold, int window, int samples, int most, float *out) {
  std::vector<int> counts(C), peaks(C * most * 2), links(K * 2 * most, -1), objects(most * C, -1);
  std::vector<float> refined(C * most * 2), graph(K * most * most);
  std::vector<char> workspace(std::max(assignment_out_workspace(most), connect_parts_out_workspace(C, most)));
  int found = 0;
  find_peaks_out_nchw(counts.data(), peaks.data(), cmap, 1, C, H, W, most, cmap_threshold, window);
  refine_peaks_out_nchw(refined.data(), counts.data(), peaks.data(), cmap, 1, C, H, W, most, window);
  paf_score_graph_out_nkhw(graph.data(), topology, paf, counts.data(), refined.data(), 1, K, C, H, W, most, samples);
  assignment_out_nk(links.data(), graph.data(), topology, counts.data(), 1, C, K, most, link_threshold, workspace.data());
  connect_parts_out_batch(&found, objects.data(), links.data(), topology, counts.data(), 1, K, C, most, most, workspace.data());
  for (int object = 0; object < found; object++)
    for (int c = 0; c < C; c++, out += 3) {
      const int k = objects[object * C + c];
      if (k < 0) {
        out[0] = out[1] = out[2] = 0;
        continue;
      }
      const int at = (c * most + k) * 2;
      out[0] = refined[at + 1];
      out[1] = refined[at];
      out[2] = cmap[(c * H + peaks[at]) * W + peaks[at + 1]];
    }
  return found;
}
